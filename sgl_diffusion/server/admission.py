"""Who may queue work now: bounded queues, a share for each API key, room on the disk.

Whoever got in holds a ticket until the job is over. Without keys everybody is one caller, and only
the queues are bounded.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from sgl_diffusion.base.config import JobOptions
from sgl_diffusion.base.errors import BusyError, SglError
from sgl_diffusion.orchestrator.histogram import Histogram
from sgl_diffusion.orchestrator.job import Asked
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.orchestrator.pace import Pace

if TYPE_CHECKING:
    from sgl_diffusion.client.types import GenerationHandle

ANYBODY = "anonymous"


class Space(Protocol):
    def check(self) -> None:
        """Raise UnavailableError where nothing more fits."""


@dataclass(frozen=True)
class _Bounds:
    """`all` jobs of a kind are counted, or those that wait; the names are those of the options."""

    all: bool
    queue: str
    per_key: str


_BOUNDS = {
    "image": _Bounds(True, "max_queue", "max_images_per_key"),
    "video": _Bounds(False, "max_queued_videos", "max_videos_per_key"),
}


class Ticket:
    """One unfinished job. As a context manager it ends with the block, by the block's error."""

    def __init__(self, admission: Admission, kind: str, owner: str, asked: Asked) -> None:
        self.kind, self.owner, self.asked = kind, owner, asked
        self.handle: GenerationHandle | None = None
        self._admission = admission

    @property
    def waits(self) -> bool:
        return self.handle is None or self.handle.snapshot().state == "queued"

    def close(self, code: str = "") -> None:
        """The job is over: completed, or failed with `code`. A second call changes nothing."""
        self._admission._left(self, code)

    def drop(self) -> None:
        """Give the place back without an outcome: the job goes on elsewhere, or never was."""
        self._admission._tickets.discard(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, SglError):
            self.close(error.code)
        else:
            self.close("internal_error" if isinstance(error, Exception) else "cancelled")


class Admission:
    def __init__(self, options: JobOptions, space: Space) -> None:
        self._space = space
        self._options = options
        self._tickets: set[Ticket] = set()
        self._paces = {kind: Pace() for kind in _BOUNDS}
        self._ended: Counter[tuple[str, str]] = Counter()
        self._seconds = Histogram("request_seconds", "kind", "outcome")

    def enter(self, kind: str, owner: str, request: str = "") -> Ticket:
        """A place for one job; BusyError with the time to come back, or UnavailableError. `request`
        is its kind in histograms, where that says more."""
        self._space.check()
        bounds = _BOUNDS[kind]
        mine = [ticket for ticket in self._tickets if ticket.kind == kind]
        queued = sum(bounds.all or ticket.waits for ticket in mine)
        self._check(kind, queued, bounds.queue, "unfinished" if bounds.all else "waiting")
        if owner != ANYBODY:
            own = sum(ticket.owner == owner for ticket in mine)
            self._check(kind, own, bounds.per_key, "unfinished under this key")
        return self.readmit(kind, owner, Asked(request or kind))

    def readmit(self, kind: str, owner: str, asked: Asked | None = None) -> Ticket:
        """A place for a job that was taken in before, by an earlier server unless it is said how:
        it is never refused."""
        ticket = Ticket(self, kind, owner, asked or Asked(kind))
        self._tickets.add(ticket)
        return ticket

    def eta(self, kind: str, jobs: float) -> int | None:
        """Seconds that so many jobs will take, by those that have ended; None before the first."""
        seconds = self._paces[kind].eta(jobs)
        return None if seconds is None else math.ceil(seconds)

    def metrics(self) -> list[Metric]:
        depth = Counter(ticket.kind for ticket in self._tickets if ticket.waits)
        running = Counter(ticket.kind for ticket in self._tickets if not ticket.waits)
        return [
            *(Metric("queue_depth", depth[kind], {"kind": kind}, "gauge") for kind in _BOUNDS),
            *(
                Metric("jobs_in_progress", running[kind], {"kind": kind}, "gauge")
                for kind in _BOUNDS
            ),
            *(
                Metric("job_total", count, {"kind": kind, "outcome": _outcome(code), "code": code})
                for (kind, code), count in sorted(self._ended.items())
            ),
            *self._seconds.metrics(),
        ]

    def _check(self, kind: str, count: int, option: str, state: str) -> None:
        if count < getattr(self._options, option):
            return
        pace = self._paces[kind]
        eta, wait = pace.eta(count), pace.retry_after(count)
        about = "" if eta is None else f"; they take about {eta:.0f} s"
        raise BusyError(
            f"The queue is full: {count} {kind}s are {state}{about}.",
            hint=f"Try again in {wait} s; the operator may raise --{option.replace('_', '-')}.",
            retry_after=wait,
        )

    def _left(self, ticket: Ticket, code: str) -> None:
        if ticket in self._tickets:
            self._tickets.discard(ticket)
            self._ended[ticket.kind, code] += 1
            outcome = code if code == "cancelled" else _outcome(code)
            self._seconds.add(time.monotonic() - ticket.asked.since, ticket.asked.kind, outcome)
            if not code:
                self._paces[ticket.kind].ended(ticket.asked.since)


def _outcome(code: str) -> str:
    return "failed" if code else "completed"
