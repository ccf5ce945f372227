"""Control actions that wait for the stage's answer; never retried, they fail with the worker."""

from __future__ import annotations

import asyncio
import uuid

from sgl_diffusion.base.errors import UnavailableError, from_wire
from sgl_diffusion.orchestrator.messages import Control, ControlDone, Payload
from sgl_diffusion.orchestrator.transport import Link


class Controls:
    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[Payload]] = {}

    async def run(self, link: Link, action: str, payload: Payload) -> Payload:
        """Send the action and wait; raises what the worker raised."""
        control_id = uuid.uuid4().hex
        answer: asyncio.Future[Payload] = asyncio.get_running_loop().create_future()
        self._waiting[control_id] = answer
        try:
            link.send(Control(control_id, action, payload))
            return await answer
        finally:
            self._waiting.pop(control_id, None)

    def done(self, message: ControlDone) -> None:
        # Whoever gave up waiting has taken the future along.
        answer = self._waiting.pop(message.control_id, None)
        if answer is None or answer.done():
            return
        if message.error is None:
            answer.set_result(message.payload)
        else:
            answer.set_exception(from_wire(message.error))

    def lost(self, why: str) -> None:
        """The worker is gone, and nobody knows what it did."""
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(UnavailableError(f"The worker {why} before it answered."))
