"""The native runner: many jobs at once, one unit of work at a time.

A unit is the encoding of one job's prompts, one denoise step of one batch of rows, or the decoding
of one chunk of one row. Between units jobs are added and dropped, so joining, leaving and
cancelling happen at step boundaries. While there is something to denoise, encoding and decoding are
done beside it, and several batches at the same time where that pays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from sgl_diffusion.engine.accounts import Accounts
from sgl_diffusion.engine.batch_sizes import BatchSizes
from sgl_diffusion.engine.beside import Beside
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.denoise import shape_key
from sgl_diffusion.engine.denoising import Denoising
from sgl_diffusion.engine.errand import Errand
from sgl_diffusion.engine.errands import Errands
from sgl_diffusion.engine.forwards import Forwards
from sgl_diffusion.engine.job import Group, Job, Row
from sgl_diffusion.engine.lineup import (
    Batch,
    Offer,
    Unit,
    first_jobs,
    line_up,
)
from sgl_diffusion.engine.overlap import Overlap
from sgl_diffusion.engine.packing import packs
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.prompts import PromptCache
from sgl_diffusion.engine.pulse import Pace, keep_pulse
from sgl_diffusion.engine.shared import Fail, Shared
from sgl_diffusion.engine.tiles import Tiles
from sgl_diffusion.engine.trace import Trace
from sgl_diffusion.engine.turns import Turns
from sgl_diffusion.engine.watch import AbandonedError, Watch
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Outbox

Finish = Callable[[Job, list[torch.Tensor]], None]

_POLL_SECONDS = 1.0
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
        self.sizes = BatchSizes(bounds.rows, bounds.lanes)
        self._packing = bounds.packing and branches is None
        self.trace = Trace(pipeline.device)
        self.forwards = Forwards(pipeline, bounds, self.counters, self._watch, self.trace, branches)
        self.adapters = self.forwards.adapters
        self._pace = Pace(pipeline.device, outbox.poll)
        self._accounts = Accounts(self.counters, pipeline.card.name)
        prompts = PromptCache(pipeline, bounds.prompt_bytes, self.counters)
        self._errands = Errands(pipeline, prompts, outbox, self._decoded, tiles)
        self.shares_decoding = tiles is not None and tiles.shared
        shared = Shared(self._jobs, self.sizes, self._accounts, outbox, fail)
        ranks = branches is not None
        self._denoising = Denoising(
            shared, self.forwards, self._give_way, lanes=bounds.lanes, ranks=ranks
        )
        self._lanes = self._denoising.lanes
        self._overlap: Overlap | None = None
        if bounds.overlap and not ranks:
            beside = Beside(pipeline.device, self.trace)
            self._overlap = Overlap(shared, beside, self._errands, self._take, 2 * bounds.rows)
        self._offers: dict[Group, Offer] = {}
        self._changed = True  # since it was last looked what could be done
        self._timed: tuple[Unit, Job, float] | None = None  # the unit under way, its begin
        keep_pulse(pipeline.blocks(), pipeline.device, self._watch.look_up)

    def add(self, job: Job) -> None:
        job.packs = self._packing and packs(self._pipeline, job)
        job.deadline += _PATIENCE * self.sizes.costs.estimate(job.params) / job.weight
        self._jobs[job.id] = job
        self._changed = True

    def drop(self, job_id: str) -> Job | None:
        job = self._jobs.pop(job_id, None)
        self.sizes.room.forget(job_id)
        self._changed = True
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
        while self._lanes.busy:
            self._lanes.wait(_POLL_SECONDS)
            self._collect()
            self._outbox.poll()

    def step(self) -> bool:
        """One unit of work, for the group that is most behind, or its begin in a lane."""
        self._catch_up()
        graphs = self.forwards.graphs
        if graphs is not None and (self._overlap is None or not self._overlap.busy):
            graphs.make()
        unit = self.choose()
        if isinstance(unit, Batch) and unit.lanes > 1:
            self._denoising.begin(unit, self._offers[unit.job.group].weight)
        elif unit is not None:
            self.run(unit)
        elif self._overlap is None or not (self._overlap.busy or self._lanes.busy):
            return False
        else:
            self._overlap.wait(self._lanes.futures)
        return True

    def choose(self) -> Unit | None:
        """The next unit of the group that is most behind; what can be done beside it, begins."""
        self._catch_up()
        if self._overlap is not None and self._overlap.crowded:
            self.settle()
            self._overlap = None
            self.sizes.one_lane()
        if self._overlap is not None:
            self._changed |= self._overlap.collect()
            self._collect()
        if not (self._changed or self._lanes.free):
            return None
        self._changed = False
        jobs = self.sizes.room.fitting(first_jobs(self._jobs.values(), self._bounds.jobs))
        self._accounts.standing(jobs)
        shares = partial(self.sizes.share, self._jobs.values(), jobs)
        self._offers = line_up(self._pipeline, jobs, shares)
        if self._overlap is not None and self._lanes.busy:
            self._overlap.send(jobs)
            return self._next_in_lane(jobs)
        if not self._offers:
            return None
        offer = self._offers[self._turns.next(self._offers)]
        if self._overlap is None:
            return offer.next
        unit = self._overlap.unit(offer, jobs)
        if isinstance(unit, Batch):
            self._overlap.send(jobs)
        elif not self._overlap.gives_way(unit):
            return None
        return unit

    def _next_in_lane(self, jobs: Sequence[Job]) -> Batch | None:
        """The next batch for a lane that is free, while others are not. Whoever should have the
        device to itself waits until they are, and keeps its turn."""
        assert self._overlap is not None
        units = {}
        for group, offer in self._offers.items():
            unit = self._overlap.unit(offer, jobs)
            if not self._overlap.takes(unit, jobs):
                units[group] = unit
        if not units or not self._lanes.free:
            return None
        takers = {group: self._offers[group] for group in units}
        unit = units[self._turns.next(takers, self._lanes.groups | self._offers.keys())]
        return unit if isinstance(unit, Batch) and unit.lanes > 1 else None

    def run(self, unit: Unit) -> None:
        """Do one unit."""
        self._catch_up()
        start = time.perf_counter()
        if isinstance(unit, Batch):
            done = self._denoising.step(unit)
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
        self.forwards.keep(self._jobs)

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

    def _give_way(self, batch: Batch) -> bool:
        if self._overlap is None or not (batch.lanes > 1 or self._overlap.busy):
            return False
        self._overlap.give_up()
        return True

    def _collect(self) -> None:
        """Take over what was done in lanes, each of which had its share of the device."""
        for done in self._denoising.collect():
            self._changed = True
            batch = done.batch
            self._turns.spent(batch.job.group, done.seconds / batch.lanes, done.weight)
            if done.error is None:
                self._denoising.took(batch, done.seconds)

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
            self._denoising.took(unit, seconds)
            if self.forwards.graphs is not None:
                self.forwards.graphs.took(seconds)
