"""Control actions that wait for the stage's answers; never retried, they fail with the worker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection

from sgl_diffusion.base.errors import UnavailableError, from_wire
from sgl_diffusion.orchestrator.messages import Control, ControlDone, Payload
from sgl_diffusion.orchestrator.replicas import Replica


class Controls:
    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Replica, asyncio.Future[Payload]]] = {}

    async def run(self, replica: Replica, action: str, payload: Payload) -> Payload:
        """Send the action and wait; raises what the worker raised."""
        control_id = uuid.uuid4().hex
        answer: asyncio.Future[Payload] = asyncio.get_running_loop().create_future()
        self._waiting[control_id] = replica, answer
        try:
            replica.send(Control(control_id, action, payload))
            return await answer
        finally:
            self._waiting.pop(control_id, None)

    async def run_in_all(
        self, replicas: Collection[Replica], action: str, payload: Payload
    ) -> list[Payload]:
        """The answers of all; raises what the first that raised has raised."""
        return [_answer(outcome) for outcome in await self.outcomes(replicas, action, payload)]

    async def change(self, replicas: Collection[Replica], action: str, payload: Payload) -> Payload:
        """Change all replicas or none: if some can make the change, the others are started anew,
        from what is kept of it for the next worker."""
        outcomes = await self.outcomes(replicas, action, payload)
        made = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        if not made:
            return _answer(outcomes[0])
        for replica, outcome in zip(replicas, outcomes, strict=True):
            if isinstance(outcome, BaseException) and replica.link is not None:
                replica.supervisor.replace("change", f"could not make a change: {outcome}")
        return made[0]

    async def outcomes(
        self, replicas: Collection[Replica], action: str, payload: Payload
    ) -> list[Payload | BaseException]:
        """What each answered or raised."""
        runs = (self.run(replica, action, payload) for replica in replicas)
        return await asyncio.gather(*runs, return_exceptions=True)

    def done(self, message: ControlDone) -> None:
        # Whoever gave up waiting has taken the future along.
        _, answer = self._waiting.pop(message.control_id, (None, None))
        if answer is None or answer.done():
            return
        if message.error is None:
            answer.set_result(message.payload)
        else:
            answer.set_exception(from_wire(message.error))

    def lost(self, replica: Replica | None, why: str) -> None:
        """This worker is gone, or without one all are, and nobody knows what it did."""
        for asked, answer in self._waiting.values():
            if replica in (asked, None) and not answer.done():
                answer.set_exception(UnavailableError(f"The worker {why} before it answered."))


def _answer(outcome: Payload | BaseException) -> Payload:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
