"""Denoise steps of batches, here or in lanes, and what becomes of their rows and jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from sgl_diffusion.base.log import get_logger
from sgl_diffusion.components.samplers import SolverState
from sgl_diffusion.engine.denoise import move
from sgl_diffusion.engine.failures import is_out_of_memory, numbers_broken
from sgl_diffusion.engine.forwards import Forwards
from sgl_diffusion.engine.job import Row
from sgl_diffusion.engine.lanes import Done, StepLanes
from sgl_diffusion.engine.lineup import Batch
from sgl_diffusion.engine.previews import take_preview
from sgl_diffusion.engine.shared import Shared
from sgl_diffusion.engine.watch import AbandonedError
from sgl_diffusion.orchestrator.stage import CannotGoOnError

log = get_logger(__name__)


class Denoising:
    """`give_way` is called when a step ran out of memory, and tells whether other things that went
    on at the same time will not any more; with `ranks` what fails ends them all."""

    def __init__(
        self,
        shared: Shared,
        forwards: Forwards,
        give_way: Callable[[Batch], bool],
        *,
        lanes: int,
        ranks: bool,
    ) -> None:
        self.lanes = StepLanes(lanes)
        self._shared = shared
        self._forwards = forwards
        self._give_way = give_way
        self._ranks = ranks

    def step(self, batch: Batch) -> bool:
        """Make it here; whether it was made."""
        start = time.perf_counter()
        try:
            states = self._forwards.run(batch)
        except Exception as error:
            self._failed(batch, error)
            return False
        self._moved(batch, states, time.perf_counter() - start)
        return True

    def begin(self, batch: Batch, weight: float) -> None:
        """Make it in a lane; its group has this weight."""
        try:
            work = self._forwards.work(batch)
        except Exception as error:
            self._failed(batch, error)
            return
        for job in batch.jobs:
            job.in_lane = True
        self.lanes.start(batch, weight, work)

    def collect(self) -> Iterator[Done]:
        """What has left its lane, whether it was made or not."""
        for done in self.lanes.collect():
            for job in done.batch.jobs:
                job.in_lane = False
            if done.error is None:
                self._moved(done.batch, done.states, done.seconds)
            else:
                self._failed(done.batch, done.error)
            yield done

    def took(self, batch: Batch, seconds: float) -> None:
        """The device is done with it."""
        rows = [row.job.params for row in batch.rows]
        self._shared.accounts.steps.add(rows, seconds)
        self._shared.sizes.costs.add(batch.key, rows, seconds, batch.lanes)

    def _moved(self, batch: Batch, states: Sequence[SolverState], seconds: float) -> None:
        move(batch.rows, states)
        accounts = self._shared.accounts
        accounts.spend(batch.jobs, "denoise", seconds, beside=batch.lanes > 1)
        accounts.step(batch.rows)
        for row in batch.rows:
            take_preview(row)
            if row.denoised:
                row.memory = row.gap = None
        for job in batch.jobs:
            self._shared.outbox.progress(job.id, job.step, job.steps, "denoise")
            job.apart &= any(row not in batch.rows for row in job.to_denoise)
            if not job.to_denoise:
                job.condition = job.negative = None
            if any(row.job is job and _broken(row) for row in batch.rows):
                self._shared.fail([job], numbers_broken())

    def _failed(self, batch: Batch, error: Exception) -> None:
        if isinstance(error, AbandonedError):
            return
        if self._ranks:
            raise CannotGoOnError("a step of several ranks failed") from error
        full = is_out_of_memory(error)
        if full and self._give_way(batch):
            return
        if full and len(batch.rows) > 1:
            self._reduce(batch)
        elif len(batch.jobs) > 1:
            self._part(batch, error)
        else:
            self._shared.fail(batch.jobs, error)

    def _part(self, batch: Batch, error: Exception) -> None:
        """No row has moved, and nobody knows whose fault it was: the same step again, each job by
        itself."""
        log.warning(
            "a step of %d jobs failed; each makes it alone", len(batch.jobs), exc_info=error
        )
        for job in batch.jobs:
            job.apart = True

    def _reduce(self, batch: Batch) -> None:
        """After an out-of-memory no row has moved: the same step again, in smaller batches."""
        self._shared.sizes.reduce(batch.key, len(batch.rows) // 2)
        self._forwards.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _broken(row: Row) -> bool:
    """Whether a row ends with latents that are no numbers, of which a picture would be noise. It is
    asked once: the host waits for the answer."""
    assert row.state is not None
    return row.denoised and not bool(torch.isfinite(row.state.x).all())
