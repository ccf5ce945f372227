"""The errors with which the coordinator itself ends a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import (
    CancelledError,
    EngineError,
    OutOfMemoryError,
    UnavailableError,
    WorkerLostError,
)

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.job import Job


def cancelled() -> CancelledError:
    return CancelledError("The job was cancelled.")


def too_late(seconds: float) -> EngineError:
    return EngineError(
        f"The job was not done within {seconds:g} s.",
        hint="Ask for less, or allow more time.",
        code="deadline_exceeded",
    )


def worker_lost(reason: str, why: str, job: Job) -> EngineError:
    message = (
        f"The worker {why} {job.lost_at}, in the last of {job.attempt} attempts; it is started "
        "again without the job."
    )
    if reason == "memory":
        return OutOfMemoryError(message, hint="Ask for less at once, or give it more memory.")
    hint = "The server's log has the details; a smaller job may work."
    if reason == "silent":
        hint = (
            "If it hangs, the server's log has the details. If one step takes that long here, ask "
            "for less, or start the server with a longer --worker-timeout."
        )
    return WorkerLostError(message, hint=hint)


def server_stopped() -> UnavailableError:
    return UnavailableError("The server stopped before the job ended.", code="server_restarted")
