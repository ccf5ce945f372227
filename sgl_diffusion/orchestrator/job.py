"""A job on its way through the coordinator, and the handle its owner holds.

Everything here is touched from the coordinator's event loop only.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from sgl_diffusion.base.errors import SglError
from sgl_diffusion.orchestrator.messages import Payload, Progress

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.replicas import Replica

JobState = Literal["queued", "in_progress", "completed", "failed"]
Kind = Literal["queued", "progress", "attempt", "output", "done", "failed"]


@dataclass(frozen=True)
class JobOutput:
    """What a stage sent: arrays (read-only; they live as long as somebody holds them) and meta."""

    arrays: list[NDArray[Any]]
    meta: Payload


@dataclass(frozen=True)
class Asked:
    """Who asked for a job, for the metrics: the kind of request, and since when it waits."""

    kind: str = "other"
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Snapshot:
    """A job at one moment. `queue_position` counts the jobs ahead, None once it runs."""

    id: str
    state: JobState
    progress: int
    step: int
    total: int
    phase: str
    attempt: int
    queue_position: int | None


@dataclass(frozen=True)
class Event:
    """What happened: `output` comes with "output" and "done", `error` with "failed"."""

    kind: Kind
    snapshot: Snapshot
    output: JobOutput | None = None
    error: SglError | None = None


class _Subscriber:
    """The events one reader has not read yet; a newer progress replaces an unread one."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.wake = asyncio.Event()

    def put(self, event: Event) -> None:
        if self.events and event.kind == self.events[-1].kind == "progress":
            self.events.pop()
        self.events.append(event)
        self.wake.set()


@dataclass(eq=False)
class Job:
    """State of one job. `replica`, which it was sent to, and `begun` are about the present attempt;
    a `suspect` was in a worker that died, `lost_at` some step. `weight` is its work, in units that
    all jobs share; with `shown` it has given a part of its result."""

    id: str
    payload: Payload
    submitted_at: float
    position: Callable[[Job], int]
    attempt: int = 1
    weight: float = 1.0
    asked: Asked = field(default_factory=Asked)
    shown: bool = False
    replica: Replica | None = None
    begun: bool = False
    suspect: bool = False
    lost_at: str = ""
    percent: int = 0
    step: int = 0
    total: int = 0
    phase: str = ""
    output: JobOutput | None = None
    error: SglError | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None
    subscribers: weakref.WeakSet[_Subscriber] = field(default_factory=weakref.WeakSet)

    def snapshot(self) -> Snapshot:
        waiting = not self.begun and not self.finished.is_set()
        return Snapshot(
            id=self.id,
            state=self.state,
            progress=self.percent,
            step=self.step,
            total=self.total,
            phase=self.phase,
            attempt=self.attempt,
            queue_position=self.position(self) if waiting else None,
        )

    @property
    def state(self) -> JobState:
        if self.finished.is_set():
            return "failed" if self.error else "completed"
        return "in_progress" if self.begun else "queued"

    def advance(self, message: Progress) -> None:
        self.begun = True
        self.step, self.total, self.phase = message.step, message.total, message.phase
        share = 100 * message.step // message.total if message.total > 0 else 0
        # A hundred is kept for a finished job.
        self.percent = max(self.percent, min(share, 99))
        self.tell("progress")

    def part(self, output: JobOutput) -> None:
        self.begun = True
        self.tell("output", output)

    def again(self) -> None:
        """Back to the queue, because the worker died."""
        self.replica = None
        self.begun = False
        known = self.total > 0
        self.lost_at = f"at step {self.step} of {self.total}" if known else "while it had the job"
        self.percent = self.step = self.total = 0
        self.phase = ""

    def complete(self, output: JobOutput) -> None:
        self.output = output
        self.percent = 100
        self._end("done", output)

    def fail(self, error: SglError) -> None:
        self.error = error
        self._end("failed", None)

    def tell(self, kind: Kind, output: JobOutput | None = None) -> None:
        if self.subscribers:
            event = Event(kind, self.snapshot(), output, self.error)
            for subscriber in list(self.subscribers):
                subscriber.put(event)

    def _end(self, kind: Kind, output: JobOutput | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.payload = {}
        self.finished.set()
        self.tell(kind, output)


class JobHandle:
    """What the submitter of a job holds. Dropping it lets the job run on and forgets the result."""

    def __init__(self, job: Job, cancel: Callable[[str], bool]) -> None:
        self._job = job
        self._cancel = cancel

    @property
    def id(self) -> str:
        return self._job.id

    def snapshot(self) -> Snapshot:
        return self._job.snapshot()

    def events(self) -> AsyncIterator[Event]:
        """What happens from this call on: the present state first, the outcome last."""
        subscriber = _Subscriber()
        subscriber.put(_present(self._job))
        self._job.subscribers.add(subscriber)
        return _read(subscriber)

    async def result(self) -> JobOutput:
        """Wait for the outcome; raises the job's SglError. Giving up the wait cancels nothing."""
        await self._job.finished.wait()
        if self._job.error is not None:
            raise self._job.error
        assert self._job.output is not None
        return self._job.output

    def cancel(self) -> bool:
        """End the job now with CancelledError; False if it had ended before."""
        return self._cancel(self._job.id)


def jobs_ahead(jobs: Iterable[Job], job: Job) -> int:
    """How many of `jobs`, oldest first, wait before `job`."""
    return sum(
        not other.begun for other in itertools.takewhile(lambda other: other is not job, jobs)
    )


def _present(job: Job) -> Event:
    if job.error is not None:
        return Event("failed", job.snapshot(), None, job.error)
    if job.output is not None:
        return Event("done", job.snapshot(), job.output)
    return Event("progress" if job.begun else "queued", job.snapshot())


async def _read(subscriber: _Subscriber) -> AsyncIterator[Event]:
    while True:
        while subscriber.events:
            event = subscriber.events.popleft()
            yield event
            if event.kind in ("done", "failed"):
                return
        subscriber.wake.clear()
        await subscriber.wake.wait()
