"""Who may queue work now: bounded queues, a share for each API key, room on the disk.

Whoever got in holds a ticket until the job is over. Without keys everybody is one caller, and only
the queues are bounded.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from sgl_diffusion.base.config import JobOptions
from sgl_diffusion.base.errors import BusyError, SglError
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
    waiting: int | None
    unfinished: int | None
    per_key: int
    flags: tuple[str, str]


class Ticket:
    """One unfinished job. As a context manager it ends with the block, by the block's error."""

    def __init__(self, admission: Admission, kind: str, owner: str) -> None:
        self.kind, self.owner = kind, owner
        self.handle: GenerationHandle | None = None
        self._admission = admission
        self._since = time.monotonic()

    @property
    def waits(self) -> bool:
        return self.handle is None or self.handle.snapshot().state == "queued"

    def close(self, code: str = "") -> None:
        """The job is over: completed, or failed with `code`. A second call changes nothing."""
        self._admission._left(self, code, self._since)

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
        self._bounds = {
            "image": _Bounds(
                None, options.max_queue, options.max_images_per_key, ("queue", "images-per-key")
            ),
            "video": _Bounds(
                options.max_queued_videos,
                None,
                options.max_videos_per_key,
                ("queued-videos", "videos-per-key"),
            ),
        }
        self._tickets: set[Ticket] = set()
        self._paces = {kind: Pace() for kind in self._bounds}
        self._ended: Counter[tuple[str, str]] = Counter()

    def enter(self, kind: str, owner: str) -> Ticket:
        """A place for one job; BusyError with the time to come back, or UnavailableError."""
        self._space.check()
        bounds = self._bounds[kind]
        mine = [ticket for ticket in self._tickets if ticket.kind == kind]
        waiting = sum(ticket.waits for ticket in mine)
        if bounds.waiting is not None and waiting >= bounds.waiting:
            raise self._full(kind, waiting, f"{waiting} {kind}s are waiting", bounds.flags[0])
        if bounds.unfinished is not None and len(mine) >= bounds.unfinished:
            raise self._full(kind, len(mine), f"{len(mine)} {kind}s are unfinished", bounds.flags[0])
        own = sum(ticket.owner == owner for ticket in mine)
        if owner != ANYBODY and own >= bounds.per_key:
            raise self._full(kind, own, f"{own} {kind}s of this key are unfinished", bounds.flags[1])
        return self.readmit(kind, owner)

    def readmit(self, kind: str, owner: str) -> Ticket:
        """A place for a job that an earlier server took in: it is never refused."""
        ticket = Ticket(self, kind, owner)
        self._tickets.add(ticket)
        return ticket

    def metrics(self) -> list[Metric]:
        depth = Counter(ticket.kind for ticket in self._tickets if ticket.waits)
        running = Counter(ticket.kind for ticket in self._tickets if not ticket.waits)
        return [
            *(Metric("queue_depth", depth[kind], {"kind": kind}, "gauge") for kind in self._bounds),
            *(
                Metric("jobs_in_progress", running[kind], {"kind": kind}, "gauge")
                for kind in self._bounds
            ),
            *(
                Metric("job_total", count, {"kind": kind, "outcome": _outcome(code), "code": code})
                for (kind, code), count in sorted(self._ended.items())
            ),
        ]

    def _full(self, kind: str, ahead: int, what: str, flag: str) -> BusyError:
        pace = self._paces[kind]
        eta, wait = pace.eta(ahead), pace.retry_after(ahead)
        about = "" if eta is None else f"; they take about {eta:.0f} s"
        return BusyError(
            f"{what}, which is the limit{about}.",
            hint=f"Try again in {wait} s; the operator sets the limit with --max-{flag}.",
            retry_after=wait,
        )

    def _left(self, ticket: Ticket, code: str, since: float) -> None:
        if ticket in self._tickets:
            self._tickets.discard(ticket)
            self._ended[ticket.kind, code] += 1
            if not code:
                self._paces[ticket.kind].ended(since)


def _outcome(code: str) -> str:
    return "failed" if code else "completed"
