"""Within a unit of work: what nobody waits for any more ends there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sgl_diffusion.engine.job import Job
from sgl_diffusion.orchestrator.stage import Outbox


class AbandonedError(Exception):
    """Ends a unit whose jobs were all dropped meanwhile."""


class Watch:
    """`jobs` are those that somebody waits for. A unit of several ranks goes on to its end."""

    def __init__(self, outbox: Outbox, jobs: Mapping[str, Job], *, alone: bool) -> None:
        self._outbox = outbox
        self._jobs = jobs
        self._alone = alone
        self._working: Sequence[Job] = ()

    @contextmanager
    def of(self, jobs: Sequence[Job]) -> Iterator[None]:
        """A unit of these jobs."""
        self._working = jobs
        try:
            yield
        finally:
            self._working = ()

    def look_up(self) -> None:
        """Take in messages; it may end the unit."""
        self._outbox.poll()
        if self._alone and self._working and not any(j.id in self._jobs for j in self._working):
            raise AbandonedError
