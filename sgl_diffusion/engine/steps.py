"""The native runner: many jobs at once, one unit of work at a time.

A unit is the encoding of one job's prompts, one denoise step of one batch of rows, or the decoding
of one chunk of one row. Between units jobs are added and dropped, so joining, leaving and
cancelling happen at step boundaries. While there is something to denoise, encoding and decoding are
done beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from sgl_diffusion.engine.accounts import Accounts
from sgl_diffusion.engine.batch_sizes import BatchSizes
from sgl_diffusion.engine.beside import Beside
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.contexts import Contexts
from sgl_diffusion.engine.costs import Waiting
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.denoise import ShapeKey, denoise, shape_key
from sgl_diffusion.engine.errand import Errand
from sgl_diffusion.engine.errands import Errands
from sgl_diffusion.engine.failures import is_out_of_memory
from sgl_diffusion.engine.graphs.passes import graphed_passes
from sgl_diffusion.engine.job import Group, Job, Row
from sgl_diffusion.engine.lineup import (
    Batch,
    Offer,
    Unit,
    first_jobs,
    line_up,
)
from sgl_diffusion.engine.lora.rows import RowAdapters
from sgl_diffusion.engine.overlap import Overlap
from sgl_diffusion.engine.packing import packs
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.previews import take_preview
from sgl_diffusion.engine.prompts import PromptCache
from sgl_diffusion.engine.pulse import Pace, keep_pulse
from sgl_diffusion.engine.step_cache import StepCache
from sgl_diffusion.engine.tiles import Tiles
from sgl_diffusion.engine.trace import Trace
from sgl_diffusion.engine.turns import Turns
from sgl_diffusion.engine.watch import AbandonedError, Watch
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Outbox

Finish = Callable[[Job, list[torch.Tensor]], None]
Fail = Callable[[list[Job], Exception], None]

_PATIENCE = 4.0  # a job that takes so many times what it takes alone is in time


class StepRunner:
    """Runs the jobs of one pipeline; reports through `finish` and `fail`."""

    def __init__(
        self,
        pipeline: Pipeline,
        bounds: Bounds,
        outbox: Outbox,
        finish: Finish,
        fail: Fail,
        branches: Branches | None = None,
        tiles: Tiles | None = None,
    ) -> None:
        """`branches` are there if this is one of several ranks: what fails in a step of many ranks
        ends them all, as nobody knows what the others did. `tiles` decode, where they are there."""
        self._pipeline = pipeline
        self._bounds = bounds
        self._outbox = outbox
        self._finish = finish
        self._fail = fail
        self._jobs: dict[str, Job] = {}
        self.counters = Counters()
        self._watch = Watch(outbox, self._jobs, alone=branches is None)
        self._turns = Turns()
        self.sizes = BatchSizes(bounds.rows)
        self._packing = bounds.packing and branches is None
        self._branches = branches
        self.graphs = None if branches else graphed_passes(pipeline, bounds, self.counters)
        self._contexts = Contexts(pipeline, branches)
        self.adapters = RowAdapters(pipeline.device)
        self._pace = Pace(pipeline.device, outbox.poll)
        self._accounts = Accounts(self.counters, pipeline.card.name)
        prompts = PromptCache(pipeline, bounds.prompt_bytes, self.counters)
        self._step_cache = StepCache(pipeline, self.counters)
        self._errands = Errands(pipeline, prompts, outbox, self._decoded, tiles)
        self.shares_decoding = tiles is not None and tiles.shared
        self.trace = Trace(pipeline.device)
        self._overlap: Overlap | None = None
        if bounds.overlap and branches is None:
            self._overlap = Overlap(
                Beside(pipeline.device, self.trace),
                self._errands,
                self._accounts,
                self._jobs,
                2 * bounds.rows,
                self.sizes.room,
                self._take,
                fail,
            )
        self._offers: dict[Group, Offer] = {}
        self._timed: tuple[Unit, Job, float] | None = None  # the unit under way, its begin
        keep_pulse(pipeline.blocks(), pipeline.device, self._watch.look_up)

    def add(self, job: Job) -> None:
        job.packs = self._packing and packs(self._pipeline, job)
        job.deadline += _PATIENCE * self.sizes.costs.estimate(job.params) / job.weight
        self._jobs[job.id] = job

    def drop(self, job_id: str) -> Job | None:
        job = self._jobs.pop(job_id, None)
        self.sizes.room.forget(job_id)
        if job is not None and self._overlap is not None:
            self._overlap.drop(job)
        return job

    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    def job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def running(self) -> int:
        return len(self._jobs)

    def settle(self) -> None:
        """Wait for what other threads do with the weights."""
        if self._overlap is not None:
            self._overlap.settle(self._outbox.poll)

    def step(self) -> bool:
        """One unit of work, for the group that is most behind."""
        self._catch_up()
        if self.graphs is not None and (self._overlap is None or not self._overlap.busy):
            self.graphs.make()
        unit = self.choose()
        if unit is not None:
            self.run(unit)
            return True
        if self._overlap is None or not self._overlap.busy:
            return False
        self._overlap.wait()
        return True

    def choose(self) -> Unit | None:
        """The next unit of the group that is most behind; what can be done beside it, begins."""
        self._catch_up()
        if self._overlap is not None and self._overlap.crowded:
            self.settle()
            self._overlap = None
        if self._overlap is not None:
            self._overlap.collect()
        jobs = self.sizes.room.fitting(first_jobs(self._jobs.values(), self._bounds.jobs))
        self._accounts.standing(jobs)
        self._offers = line_up(self._pipeline, jobs, self._rows)
        if not self._offers:
            return None
        offer = self._offers[self._turns.next(self._offers)]
        if self._overlap is None:
            return offer.next
        unit = offer.next
        fits = isinstance(unit, Batch) or self._overlap.fits(unit, jobs)
        if offer.beside is not None and fits:
            unit = offer.beside
        if isinstance(unit, Batch):
            self._overlap.send(jobs)
        elif not self._overlap.gives_way(unit):
            return None
        return unit

    def run(self, unit: Unit) -> None:
        """Do one unit."""
        self._catch_up()
        start = time.perf_counter()
        if isinstance(unit, Batch):
            done = self._denoise(unit)
        else:
            done = self._do(self._errands.of(unit))
        self._timed = (unit, unit.job, start) if done else None
        self._pace.mark()
        if not self._pace.lags:
            self._stop_clock()

    def _catch_up(self) -> None:
        """The unit before this one is over."""
        self._pace.wait()
        self._stop_clock()
        self._contexts.keep(self._jobs)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """A step of these rows, which must fit together."""
        (key,) = {shape_key(self._pipeline, row) for row in rows}
        return Batch(key, tuple(rows))

    # -- units -------------------------------------------------------------------------------------

    def _guard(self, job: Job, unit: Callable[[], None], *, shared: bool = False) -> bool:
        """An error in a unit of one job fails that job only, unless it is shared by ranks."""
        try:
            with self._watch.of([job]):
                unit()
        except AbandonedError:
            return False
        except Exception as error:
            if shared:
                raise CannotGoOnError("a decode of several ranks failed") from error
            self._fail([job], error)
            return False
        return True

    def _do(self, errand: Errand) -> bool:
        job, start = errand.job, time.perf_counter()
        # The prompts, too, go through adapted layers.
        blends = [job.blend] if errand.lane == "encode" else []
        with self.trace.span(errand.lane, job=job.id), self.adapters.of(blends):
            done = self._guard(
                job,
                lambda: errand.take(errand.work(lambda: False)),
                shared=self.shares_decoding and errand.lane == "decode",
            )
        self._accounts.spend([job], errand.lane, time.perf_counter() - start, beside=False)
        return done

    def _take(self, errand: Errand, result: object) -> None:
        self._guard(errand.job, lambda: errand.take(result))

    def _decoded(self, job: Job) -> None:
        if self.drop(job.id) is not None:
            self._finish(job, [torch.cat(row.frames) for row in job.rows])

    def _denoise(self, batch: Batch) -> bool:
        rows = batch.rows
        jobs = list({row.job.id: row.job for row in rows}.values())
        start = time.perf_counter()
        blends, ids = [row.job.blend for row in rows], [job.id for job in jobs]
        sizes = ", ".join(dict.fromkeys(job.size for job in jobs))
        span = self.trace.span("denoise", rows=len(rows), jobs=ids, size=sizes)
        plain = not batch.key.alone and not any(blends)  # with the weights as they are
        run = self.graphs.velocity if self.graphs is not None and plain else None
        try:
            reused = self._step_cache.of(rows[0] if batch.key.alone else None)
            with span, self._watch.of(jobs), self.adapters.of(blends), reused:
                context = self._contexts.of(batch.key, rows)
                denoise(self._pipeline, batch.key, rows, context, self._branches, run)
        except AbandonedError:
            return False
        except Exception as error:
            if self._branches is not None:
                raise CannotGoOnError("a step of several ranks failed") from error
            if is_out_of_memory(error) and self._overlap is not None and self._overlap.busy:
                self._overlap.give_up()
            elif is_out_of_memory(error) and len(rows) > 1:
                self._reduce(batch.key, len(rows) // 2)
            else:
                self._fail(jobs, error)
            return False
        self._accounts.spend(jobs, "denoise", time.perf_counter() - start, beside=False)
        self._accounts.step(rows)
        for row in rows:
            take_preview(row)
            if row.denoised:
                row.memory = None
        for job in jobs:
            self._outbox.progress(job.id, job.step, job.steps, "denoise")
            if not job.to_denoise:
                job.condition = job.negative = None
        return True

    def _reduce(self, key: ShapeKey, rows: int) -> None:
        """After an out-of-memory no row has moved: the same step again, in smaller batches."""
        self.sizes.reduce(key, rows)
        self._contexts.keep({})
        if self.graphs is not None:
            self.graphs.clear()
        if self._pipeline.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rows(self, key: ShapeKey, waiting: Sequence[Waiting]) -> int:
        return self.sizes.rows(self._jobs.values(), key, waiting)

    def _stop_clock(self) -> None:
        """The device is done with the last unit: so long it took."""
        if self._timed is None:
            return
        unit, job, start = self._timed
        self._timed = None
        seconds = time.perf_counter() - start
        if job.group in self._offers:
            self._turns.spent(job.group, seconds, self._offers[job.group].weight)
        if isinstance(unit, Batch):
            rows = [row.job.params for row in unit.rows]
            self._accounts.steps.add(rows, seconds)
            self.sizes.costs.add(unit.key, rows, seconds)
            if self.graphs is not None:
                self.graphs.took(seconds)
