"""The errors with which the coordinator itself ends a job."""

from __future__ import annotations

from sgl_diffusion.base.errors import (
    CancelledError,
    EngineError,
    OutOfMemoryError,
    UnavailableError,
    WorkerLostError,
)


def cancelled() -> CancelledError:
    return CancelledError("The job was cancelled.")


def too_late(seconds: float) -> EngineError:
    return EngineError(
        f"The job was not done within {seconds:g} s.",
        hint="Ask for less, or allow more time.",
        code="deadline_exceeded",
    )


def worker_lost(reason: str, why: str, attempts: int) -> EngineError:
    message = f"The worker {why} while it ran the job, {attempts} times."
    if reason == "memory":
        return OutOfMemoryError(message, hint="Ask for less at once, or give it more memory.")
    return WorkerLostError(
        message, hint="The server's log has the details; a smaller job may work."
    )


def server_stopped() -> UnavailableError:
    return UnavailableError("The server stopped before the job ended.", code="server_restarted")
