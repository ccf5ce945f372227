"""Jobs and changes of the stage in the order they came.

A change (other weights, say) is a barrier: the jobs before it end first, and the jobs after it wait
until it is done. While there is none, jobs go straight through.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sgl_diffusion.base.errors import SglError, UnavailableError
from sgl_diffusion.orchestrator.job import Job
from sgl_diffusion.orchestrator.messages import Payload


@dataclass(frozen=True)
class GateState:
    """`held` jobs wait behind a change, which waits for `ahead` jobs or is being made."""

    changing: bool
    changes: int
    held: int
    ahead: int


class _Change:
    def __init__(self) -> None:
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Gate:
    """`dispatch` sends what is let in to the stage; `ahead` counts the unfinished jobs of these."""

    def __init__(self, dispatch: Callable[[], None], ahead: Callable[[], int]) -> None:
        self._dispatch = dispatch
        self._ahead = ahead
        self._waiting: deque[Job | _Change] = deque()
        self._open = False

    def enter(self, job: Job) -> None:
        if self._waiting:
            self._waiting.append(job)
        else:
            self._dispatch()

    def holds(self, job: Job) -> bool:
        return job in self._waiting

    def left(self, job: Job) -> None:
        """A job has ended, here or in the stage."""
        if job in self._waiting:
            self._waiting.remove(job)
        self._move()

    def stage(self, *, ready: bool) -> None:
        """Whether there is a stage; without one nothing moves."""
        self._open = ready
        self._move()

    async def change(self, work: Callable[[], Awaitable[Payload]], timeout: float) -> Payload:
        """Wait for the turn, at most `timeout` seconds, then do `work` while no job runs."""
        change = _Change()
        self._waiting.append(change)
        self._move()
        try:
            try:
                await asyncio.wait_for(change.turn, timeout)
            except TimeoutError:
                raise not_in_time(timeout) from None
            return await work()
        finally:
            self._waiting.remove(change)
            self._move()

    def close(self, error: SglError) -> None:
        """No change gets its turn any more."""
        for item in self._waiting:
            if isinstance(item, _Change) and not item.turn.done():
                item.turn.set_exception(error)

    def state(self) -> GateState:
        changes = sum(isinstance(item, _Change) for item in self._waiting)
        held = len(self._waiting) - changes
        return GateState(changes > 0, changes, held, self._ahead() if changes else 0)

    def _move(self) -> None:
        while self._open and self._waiting:
            first = self._waiting[0]
            if isinstance(first, _Change):
                if not first.turn.done() and self._ahead() == 0:
                    first.turn.set_result(None)
                return
            self._waiting.popleft()
            self._dispatch()


def not_in_time(seconds: float) -> UnavailableError:
    return UnavailableError(
        f"The jobs before this change were not done within {seconds:g} s.",
        hint="Nothing was changed. Try again later, or cancel them.",
        code="change_timeout",
    )
