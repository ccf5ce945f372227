"""How many rows the next step of a shape gets, and whether it is made in a lane: as it pays, and as
the memory has room for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sgl_diffusion.base.log import get_logger
from sgl_diffusion.engine.costs import Costs, Share, Waiting
from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.footprint.room import Room
from sgl_diffusion.engine.job import Job

log = get_logger(__name__)


class BatchSizes:
    def __init__(self, most: int, lanes: int = 1) -> None:
        self.costs = Costs()
        self.room = Room()
        self._most = most
        self._lanes = lanes
        self._reduced: dict[ShapeKey, int] = {}

    def share(
        self,
        jobs: Iterable[Job],
        working: Sequence[Job],
        key: ShapeKey,
        waiting: Sequence[Waiting],
    ) -> Share:
        """Of the rows that wait for this step, the most urgent first; `jobs` hold memory, and
        `working` are those that are worked on now."""
        most, lanes = self._reduced.get(key, self._most), self._lanes
        fit = self.room.rows(jobs, key, waiting, most)
        if fit == 0:  # beside the steps that are under way in lanes
            fit, lanes = self.room.rows(jobs, key, waiting, most, beside=False), 1
        company = sum(bool(job.to_denoise) for job in working) - len(waiting)
        return self.costs.share(key, waiting, fit, lanes, max(company, 0))

    def one_lane(self) -> None:
        """From now on steps are made one after the other."""
        self._lanes = 1

    def reduce(self, key: ShapeKey, rows: int) -> None:
        """Steps of more rows ran out of memory."""
        log.warning("out of memory: batches of %s get at most %d rows", key.latents, rows)
        self._reduced[key] = rows
