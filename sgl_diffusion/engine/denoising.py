"""Denoise steps of batches, here or in lanes, and what becomes of their rows and jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from sgl_diffusion.components.samplers import SolverState
from sgl_diffusion.engine.accounts import Accounts
from sgl_diffusion.engine.batch_sizes import BatchSizes
from sgl_diffusion.engine.denoise import move
from sgl_diffusion.engine.failures import is_out_of_memory
from sgl_diffusion.engine.forwards import Forwards
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.lanes import Done, StepLanes
from sgl_diffusion.engine.lineup import Batch
from sgl_diffusion.engine.previews import take_preview
from sgl_diffusion.engine.watch import AbandonedError
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Outbox


class Denoising:
    """`give_way` is called when a step ran out of memory, and tells whether other things that went
    on at the same time will not any more; with `ranks` what fails ends them all."""

    def __init__(
        self,
        forwards: Forwards,
        sizes: BatchSizes,
        accounts: Accounts,
        outbox: Outbox,
        fail: Callable[[list[Job], Exception], None],
        give_way: Callable[[Batch], bool],
        *,
        lanes: int,
        ranks: bool,
    ) -> None:
        self.lanes = StepLanes(lanes)
        self._forwards = forwards
        self._sizes = sizes
        self._accounts = accounts
        self._outbox = outbox
        self._fail = fail
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
        self._accounts.steps.add(rows, seconds)
        self._sizes.costs.add(batch.key, rows, seconds, batch.lanes)

    def _moved(self, batch: Batch, states: Sequence[SolverState], seconds: float) -> None:
        move(batch.rows, states)
        self._accounts.spend(batch.jobs, "denoise", seconds, beside=batch.lanes > 1)
        self._accounts.step(batch.rows)
        for row in batch.rows:
            take_preview(row)
            if row.denoised:
                row.memory = None
        for job in batch.jobs:
            self._outbox.progress(job.id, job.step, job.steps, "denoise")
            if not job.to_denoise:
                job.condition = job.negative = None

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
        else:
            self._fail(batch.jobs, error)

    def _reduce(self, batch: Batch) -> None:
        """After an out-of-memory no row has moved: the same step again, in smaller batches."""
        self._sizes.reduce(batch.key, len(batch.rows) // 2)
        self._forwards.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
