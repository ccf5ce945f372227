"""The control messages that start and stop a record of the worker."""

from __future__ import annotations

from sgl_diffusion.base.errors import ConflictError
from sgl_diffusion.engine.trace import Trace
from sgl_diffusion.orchestrator.messages import Payload

ACTIONS = ("profile_start", "profile_stop")


def run_profile(trace: Trace, action: str) -> Payload:
    """Start a record, or stop it and hand it over."""
    if action == "profile_start":
        if trace.on:
            raise ConflictError(
                "A profile is being recorded already.", hint="POST /stop_profile ends it."
            )
        trace.start()
        return {}
    if not trace.on:
        raise ConflictError("No profile is being recorded.", hint="POST /start_profile begins one.")
    return trace.stop()
