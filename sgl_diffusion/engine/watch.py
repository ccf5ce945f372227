"""Within a unit of work: what nobody waits for any more ends there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident

from sgl_diffusion.engine.job import Job
from sgl_diffusion.orchestrator.stage import Outbox


class AbandonedError(Exception):
    """Ends a unit whose jobs were all dropped meanwhile."""


class Watch:
    """`jobs` are those that somebody waits for. A unit of several ranks goes on to its end.

    Units may be under way in several threads; messages are taken in by the one that made it.
    """

    def __init__(self, outbox: Outbox, jobs: Mapping[str, Job], *, alone: bool) -> None:
        self._outbox = outbox
        self._jobs = jobs
        self._alone = alone
        self._working: dict[int, Sequence[Job]] = {}  # by thread
        self._owner = get_ident()

    @contextmanager
    def of(self, jobs: Sequence[Job]) -> Iterator[None]:
        """A unit of these jobs, in this thread."""
        self._working[get_ident()] = jobs
        try:
            yield
        finally:
            del self._working[get_ident()]

    def look_up(self) -> None:
        """Take in messages; it may end the unit of this thread."""
        if get_ident() == self._owner:
            self._outbox.poll()
        working = self._working.get(get_ident(), ())
        if self._alone and working and not any(job.id in self._jobs for job in working):
            raise AbandonedError
