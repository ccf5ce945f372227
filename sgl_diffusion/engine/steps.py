"""The native runner: many jobs at once, one unit of work at a time.

A unit is the encoding of one job's prompts, one denoise step of one batch of rows, or the decoding
of one chunk of one row. Between units jobs are added and dropped, so joining, leaving and
cancelling happen at step boundaries. While there is something to denoise, encoding and decoding are
done beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from sgl_diffusion.base.log import get_logger
from sgl_diffusion.engine.accounts import Accounts
from sgl_diffusion.engine.beside import Beside, Lane
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.contexts import Contexts
from sgl_diffusion.engine.costs import Costs
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.decoding import Part
from sgl_diffusion.engine.denoise import ShapeKey, denoise, shape_key
from sgl_diffusion.engine.encoding import Encoding
from sgl_diffusion.engine.failures import is_out_of_memory
from sgl_diffusion.engine.job import Group, Job, Row
from sgl_diffusion.engine.lineup import (
    Batch,
    Decode,
    Encode,
    Offer,
    Unit,
    first_jobs,
    line_up,
    next_to_encode,
)
from sgl_diffusion.engine.lora.rows import RowAdapters
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.previews import take_preview
from sgl_diffusion.engine.prompts import PromptCache
from sgl_diffusion.engine.pulse import Pace, keep_pulse
from sgl_diffusion.engine.trace import Trace
from sgl_diffusion.engine.turns import Turns
from sgl_diffusion.engine.watch import AbandonedError, Watch
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Outbox

log = get_logger(__name__)

T = TypeVar("T")
Finish = Callable[[Job, list[torch.Tensor]], None]
Fail = Callable[[list[Job], Exception], None]

_PATIENCE = 4.0  # a job that takes so many times what it takes alone is in time
_LOOK_UP_SECONDS = 0.005  # while there is only work in other threads


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
    ) -> None:
        """`branches` are there if this is one of several ranks: what fails in a step of many ranks
        ends them all, as nobody knows what the others did."""
        self._pipeline = pipeline
        self._bounds = bounds
        self._outbox = outbox
        self._finish = finish
        self._fail = fail
        self._jobs: dict[str, Job] = {}
        self._watch = Watch(outbox, self._jobs, alone=branches is None)
        self._turns = Turns()
        self.costs = Costs()
        self._branches = branches
        self._beside = Beside(pipeline.device) if bounds.overlap and branches is None else None
        self._contexts = Contexts(pipeline, branches)
        self._reduced: dict[ShapeKey, int] = {}
        self.adapters = RowAdapters(pipeline.device)
        self._pace = Pace(pipeline.device, outbox.poll)
        self.counters = Counters()
        self._accounts = Accounts(self.counters, pipeline.card.name)
        prompts = PromptCache(pipeline, bounds.prompt_bytes, self.counters)
        self._encoding = Encoding(pipeline, prompts)
        self.trace = Trace(pipeline.device)
        self._offers: dict[Group, Offer] = {}
        self._timed: tuple[Unit, Job, float] | None = None  # the unit under way, its begin
        keep_pulse(pipeline.blocks(), pipeline.device, self._watch.look_up)

    def add(self, job: Job) -> None:
        job.deadline += _PATIENCE * self.costs.estimate(job.params) / job.weight
        self._jobs[job.id] = job

    def drop(self, job_id: str) -> Job | None:
        return self._jobs.pop(job_id, None)

    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    def job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def running(self) -> int:
        return len(self._jobs)

    def settle(self) -> None:
        """Wait for what other threads do with the weights."""
        if self._beside is not None:
            self._beside.settle()

    def step(self) -> bool:
        """One unit of work, for the group that is most behind."""
        unit = self.choose()
        if unit is not None:
            self.run(unit)
            return True
        if self._beside is None or not self._beside.busy:
            return False
        self._beside.wait(_LOOK_UP_SECONDS)
        return True

    def choose(self) -> Unit | None:
        """The next unit of the group that is most behind; what can be done beside it, begins."""
        self._catch_up()
        if self._beside is not None:
            self._beside.collect()
        jobs = first_jobs(self._jobs.values(), self._bounds.jobs)
        self._accounts.standing(jobs)
        offers = line_up(self._pipeline, jobs, self._rows)
        units: dict[Group, Unit] = {}
        if self._beside is not None and any(offer.ready for offer in offers.values()):
            self._send(self._beside, jobs)
            for group, offer in offers.items():
                here = isinstance(offer.step, Encode) and offer.step.job.blend is not None
                if unit := offer.step if here else offer.ready:
                    units[group] = unit
        else:
            both = {group: offer.decode or offer.step for group, offer in offers.items()}
            units = {group: unit for group, unit in both.items() if unit is not None}
        self._offers = {group: offers[group] for group in units}
        return units[self._turns.next(self._offers)] if units else None

    def run(self, unit: Unit) -> None:
        """Do one unit."""
        self._catch_up()
        start = time.perf_counter()
        match unit:
            case Batch():
                done, job = self._denoise(unit), unit.rows[0].job
            case Encode(job):
                self._outbox.progress(job.id, 0, job.steps, "encode")
                # The prompts, too, go through adapted layers.
                with self.trace.span("encode", job=job.id), self.adapters.of([job.blend]):
                    done = self._guard(job, lambda: self._encoding.encode(job).give(job))
                self._accounts.spend([job], "encode", time.perf_counter() - start, beside=False)
            case Decode(job):
                part = Part.of(job)
                decode = partial(part.decode, self._pipeline)
                with self.trace.span("decode", job=job.id):
                    done = self._guard(job, lambda: self._decoded(part, decode()))
                self._accounts.spend([job], "decode", time.perf_counter() - start, beside=False)
        self._timed = (unit, job, start) if done else None
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

    def _guard(self, job: Job, unit: Callable[[], None]) -> bool:
        """An error in a unit of one job fails that job only."""
        try:
            with self._watch.of([job]):
                unit()
        except AbandonedError:
            return False
        except Exception as error:
            self._fail([job], error)
            return False
        return True

    def _decoded(self, part: Part, frames: torch.Tensor | None) -> None:
        job = part.row.job
        if part.preview is not None:
            self._outbox.output(job.id, part.meta(part.preview), [frames], final=False)
            return
        part.take(frames)
        self._outbox.progress(job.id, job.step, job.steps, "decode")
        if all(row.decoded for row in job.rows) and self.drop(job.id) is not None:
            self._finish(job, [torch.cat(row.frames) for row in job.rows])

    def _denoise(self, batch: Batch) -> bool:
        rows = batch.rows
        jobs = list({row.job.id: row.job for row in rows}.values())
        start = time.perf_counter()
        blends, ids = [row.job.blend for row in rows], [job.id for job in jobs]
        span = self.trace.span("denoise", rows=len(rows), jobs=ids, size=jobs[0].size)
        try:
            with span, self._watch.of(jobs), self.adapters.of(blends):
                context = self._contexts.of(batch.key, rows)
                denoise(self._pipeline, batch.key, rows, context, self._branches)
        except AbandonedError:
            return False
        except Exception as error:
            if self._branches is not None:
                raise CannotGoOnError("a step of several ranks failed") from error
            if is_out_of_memory(error) and len(rows) > 1:
                self._reduce(batch.key, len(rows) // 2)
            else:
                self._fail(jobs, error)
            return False
        self._accounts.spend(jobs, "denoise", time.perf_counter() - start, beside=False)
        self._accounts.step(rows)
        for row in rows:
            take_preview(row)
        for job in jobs:
            self._outbox.progress(job.id, job.step, job.steps, "denoise")
            if not job.to_denoise:
                job.condition = job.negative = None
        return True

    def _reduce(self, key: ShapeKey, rows: int) -> None:
        """After an out-of-memory no row has moved: the same step again, in smaller batches."""
        log.warning("out of memory: batches of %s get at most %d rows", key.latents, rows)
        self._reduced[key] = rows
        self._contexts.keep({})
        if self._pipeline.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rows(self, key: ShapeKey, jobs: Sequence[int]) -> int:
        return self.costs.rows(key, jobs, self._reduced.get(key, self._bounds.rows))

    # -- beside the steps --------------------------------------------------------------------------

    def _send(self, beside: Beside, jobs: Sequence[Job]) -> None:
        """Begin what lanes have room for."""
        if beside.free("encode") and (new := next_to_encode(jobs, 2 * self._bounds.rows)):
            self._outbox.progress(new.id, 0, new.steps, "encode")
            encode = partial(self._encoding.encode, new)
            self._go(beside, "encode", new, encode, lambda encoded: encoded.give(new))
        if beside.free("decode") and (done := next((job for job in jobs if job.to_decode), None)):
            part = Part.of(done)
            decode = partial(part.decode, self._pipeline)
            self._go(beside, "decode", done, decode, partial(self._decoded, part))

    def _go(
        self, beside: Beside, lane: Lane, job: Job, work: Callable[[], T], take: Callable[[T], None]
    ) -> None:
        job.away = lane

        def back(result: tuple[T, float]) -> None:
            job.away = ""
            if self._jobs.get(job.id) is job:
                self._accounts.spend([job], lane, result[1], beside=True)
                self._guard(job, lambda: take(result[0]))

        def fail(error: Exception) -> None:
            job.away = ""
            if self._jobs.get(job.id) is job:
                self._fail([job], error)

        def timed() -> tuple[T, float]:
            start = time.perf_counter()
            with self.trace.span(lane, job=job.id):
                return work(), time.perf_counter() - start

        beside.start(lane, timed, back, fail)

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
            self._accounts.steps.add(job.params, seconds)
            self.costs.add(unit.key, job.params, len(unit.rows), seconds)
