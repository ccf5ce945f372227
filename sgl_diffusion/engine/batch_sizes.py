"""How many rows the next step of a shape gets: as many as pay, and as the memory has room for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sgl_diffusion.base.log import get_logger
from sgl_diffusion.engine.costs import Costs, Waiting
from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.footprint.room import Room
from sgl_diffusion.engine.job import Job

log = get_logger(__name__)


class BatchSizes:
    def __init__(self, most: int) -> None:
        self.costs = Costs()
        self.room = Room()
        self._most = most
        self._reduced: dict[ShapeKey, int] = {}

    def rows(self, jobs: Iterable[Job], key: ShapeKey, waiting: Sequence[Waiting]) -> int:
        """Of the rows that wait for this step, the most urgent first; `jobs` hold memory."""
        most = self._reduced.get(key, self._most)
        return self.costs.rows(key, waiting, self.room.rows(jobs, key, waiting, most))

    def reduce(self, key: ShapeKey, rows: int) -> None:
        """Steps of more rows ran out of memory."""
        log.warning("out of memory: batches of %s get at most %d rows", key.latents, rows)
        self._reduced[key] = rows
