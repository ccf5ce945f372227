"""The native runner: many jobs at once, one unit of work at a time.

A unit is the encoding of one job's prompts, one denoise step of one group of rows, or the decoding
of one chunk of one row. Between units jobs are added and dropped, so joining, leaving and
cancelling happen at step boundaries.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.beginning import Origin, first_state
from sgl_diffusion.engine.contexts import Contexts
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.denoise import ShapeKey, denoise
from sgl_diffusion.engine.failures import is_out_of_memory
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.lineup import Batch, Lineup, Unit, line_up
from sgl_diffusion.engine.lora.rows import RowAdapters
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pictures import open_picture
from sgl_diffusion.engine.pipeline import Condition, KeepsPicture, Pipeline
from sgl_diffusion.engine.previews import take_preview
from sgl_diffusion.engine.prompts import PromptCache
from sgl_diffusion.engine.pulse import Pace, keep_pulse
from sgl_diffusion.engine.step_times import StepTimes
from sgl_diffusion.engine.turns import Turns
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Outbox

if TYPE_CHECKING:
    from PIL.Image import Image

log = get_logger(__name__)

Finish = Callable[[Job, list[torch.Tensor]], None]
Fail = Callable[[list[Job], Exception], None]


class _AbandonedError(Exception):
    """Ends a unit whose jobs were all dropped meanwhile."""


class StepRunner:
    """Runs the jobs of one pipeline; reports through `finish` and `fail`."""

    def __init__(
        self,
        pipeline: Pipeline,
        max_rows: int,
        outbox: Outbox,
        finish: Finish,
        fail: Fail,
        branches: Branches | None = None,
        max_jobs: int = 0,
        prompt_bytes: int = 0,
    ) -> None:
        """`branches` are there if this is one of several ranks: what fails in a step of many ranks
        ends them all, as nobody knows what the others did. At most `max_jobs` jobs are worked on
        at a time; 0 means all. Encoded prompts are kept up to `prompt_bytes`."""
        self._pipeline = pipeline
        self._max_rows = max_rows
        self._max_jobs = max_jobs or None
        self._outbox = outbox
        self._finish = finish
        self._fail = fail
        self._jobs: dict[str, Job] = {}
        self._turns = Turns()
        self._branches = branches
        self._contexts = Contexts(pipeline, branches)
        self.lineup = Lineup()
        self._reduced: dict[ShapeKey, int] = {}
        self.adapters = RowAdapters(pipeline.device)
        self._pace = Pace(pipeline.device, outbox.poll)
        self.counters = Counters()
        self._prompts = PromptCache(pipeline, prompt_bytes, self.counters)
        self._step_times = StepTimes(self.counters, pipeline.card.name)
        self._timed: tuple[ResolvedParams, float] | None = None  # the step under way, its begin
        self._working: list[Job] = []  # whose unit is being done
        keep_pulse(pipeline.blocks(), pipeline.device, self._look_up)

    def add(self, job: Job) -> None:
        self._jobs[job.id] = job

    def drop(self, job_id: str) -> Job | None:
        return self._jobs.pop(job_id, None)

    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    def running(self) -> int:
        return len(self._jobs)

    def step(self) -> bool:
        """One unit of work, for whoever has waited longest."""
        unit = self.choose()
        if unit is None:
            return False
        self.run(unit)
        return True

    def choose(self) -> Unit | None:
        """The unit of whoever has waited longest."""
        orders = self.look().orders
        if not orders:
            return None
        return self._turns.next(orders)

    def look(self) -> Lineup:
        """What could be done next."""
        self._pace.wait()
        self._stop_clock()
        jobs = itertools.islice(self._jobs.values(), self._max_jobs)
        self.lineup = line_up(self._pipeline, jobs, self._max_rows, self._reduced)
        self._contexts.keep(self.lineup.rows)
        return self.lineup

    def run(self, unit: Unit) -> None:
        """Do one unit out of `lineup`."""
        lineup = self.lineup
        if isinstance(unit, Batch):
            self._denoise(unit, lineup.rows[unit])
        elif unit == "encode" and lineup.to_encode is not None:
            self._guard(lineup.to_encode, self._encode)
        elif lineup.to_decode is not None:
            self._guard(lineup.to_decode, self._decode)
        self._working = []
        self._pace.mark()
        if not self._pace.lags:
            self._stop_clock()

    def _look_up(self) -> None:
        """Within a unit: what nobody waits for any more ends here, unless other ranks are in it."""
        self._outbox.poll()
        if self._branches is not None or not self._working:
            return
        if not any(job.id in self._jobs for job in self._working):
            raise _AbandonedError

    # -- units -------------------------------------------------------------------------------------

    def _guard(self, job: Job, unit: Callable[[Job], None]) -> None:
        """An error in a unit of one job fails that job only."""
        self._working = [job]
        try:
            unit(job)
        except _AbandonedError:
            pass
        except Exception as error:
            self._fail([job], error)

    @torch.inference_mode()
    def _encode(self, job: Job) -> None:
        start = time.perf_counter()
        pipeline, params = self._pipeline, job.params
        self._outbox.progress(job.id, 0, job.steps, "encode")
        solver = pipeline.solver(params)
        assert solver.start == params.start_step, "the recipe's solver begins somewhere else"
        pictures = [open_picture(path) for path in params.images]
        native = pipeline.card.edits == "native"
        if pictures and (not native or params.mask is not None):
            job.origin = Origin.of(pipeline, params, pictures[0])
        parts = pictures if native else []
        with self.adapters.of([job.blend]):  # the prompts, too, go through adapted layers
            job.condition = self._condition(job, params.prompt, parts)
            if params.guided:
                job.negative = self._condition(job, params.negative_prompt, parts)
        if job.origin is None and isinstance(pipeline, KeepsPicture):
            job.origin = pipeline.origin(job.condition, params)
        kept = job.origin is not None and job.origin.keep is not None
        for row in job.rows:
            noise = pipeline.noise(params, row.seed)
            row.state = first_state(job.origin, noise, solver)
            row.noise = noise.float() if kept else None
        job.solver = solver
        self._spend([job], "encode", time.perf_counter() - start)

    def _condition(self, job: Job, prompt: str, pictures: list[Image]) -> Condition:
        encode = partial(self._pipeline.encode, prompt, job.params, pictures)
        return self._prompts.get(job, prompt, encode)

    def _denoise(self, batch: Batch, rows: list[Row]) -> None:
        jobs = list({row.job.id: row.job for row in rows}.values())
        start = time.perf_counter()
        fresh = [row for row in rows if row.ran == 0]
        self._working = jobs
        try:
            with self.adapters.of([row.job.blend for row in rows]):
                context = self._contexts.of(batch.key, rows)
                denoise(self._pipeline, batch.key, rows, context, self._branches)
        except _AbandonedError:
            return
        except Exception as error:
            if self._branches is not None:
                raise CannotGoOnError("a step of several ranks failed") from error
            if is_out_of_memory(error) and len(rows) > 1:
                self._reduce(batch.key, len(rows) // 2)
            else:
                self._fail(jobs, error)
            return
        self._spend(jobs, "denoise", time.perf_counter() - start)
        self._timed = jobs[0].params, start
        self._count(rows, fresh)
        for row in rows:
            take_preview(row)
        for job in jobs:
            self._outbox.progress(job.id, job.step, job.steps, "denoise")
            if all(row.denoised for row in job.rows):
                job.condition = job.negative = None

    def _reduce(self, key: ShapeKey, rows: int) -> None:
        """After an out-of-memory no row has moved: the same step again, in smaller batches."""
        log.warning("out of memory: batches of %s get at most %d rows", key.latents, rows)
        self._reduced[key] = rows
        self._contexts.keep({})
        if self._pipeline.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _decode(self, job: Job) -> None:
        start = time.perf_counter()
        row = next(row for row in job.rows if row.to_decode)
        if row.previews:
            self._show(row)
            self._spend([job], "decode", time.perf_counter() - start)
            return
        if row.chunks is None:
            assert row.state is not None
            row.chunks = self._pipeline.decode(row.state.x)
        chunk = next(row.chunks, None)
        if chunk is None:
            row.decoded, row.chunks, row.state, row.noise = True, None, None, None
        else:
            self._pace.mark()
            self._pace.wait()
            row.frames.append(_finished(job, chunk))
        self._spend([job], "decode", time.perf_counter() - start)
        self._outbox.progress(job.id, job.step, job.steps, "decode")
        if all(row.decoded for row in job.rows) and self.drop(job.id) is not None:
            self._finish(job, [torch.cat(row.frames) for row in job.rows])

    def _show(self, row: Row) -> None:
        """Decode and send what a step of this row foresaw: one picture, of a clip as well."""
        preview = row.previews.popleft()
        (frames,) = self._pipeline.decode(preview.latents)
        meta = {"partial": preview.index, "row": row.job.rows.index(row), "step": preview.step}
        self._outbox.output(row.job.id, meta, [_finished(row.job, frames)], final=False)

    # -- accounts ----------------------------------------------------------------------------------

    def _spend(self, jobs: list[Job], phase: str, seconds: float) -> None:
        self.counters.add("phase_seconds_total", seconds, phase=phase)
        for job in jobs:
            job.spend(phase, seconds)

    def _stop_clock(self) -> None:
        """The device is done with the last unit: if it was a step, so long it took."""
        if self._timed is not None:
            params, start = self._timed
            self._timed = None
            self._step_times.add(params, time.perf_counter() - start)

    def _count(self, rows: list[Row], fresh: list[Row]) -> None:
        """Forwards by batch size; joins and leaves by whether others were, or stay, under way."""
        counters = self.counters
        counters.add("denoise_forwards_total", rows=str(len(rows)))
        counters.add("denoise_rows_total", len(rows))
        under_way = any(row.ran > 1 for row in rows)
        done = [row for row in rows if row.denoised]
        if fresh:
            counters.add("denoise_joins_total", len(fresh), running=str(under_way).lower())
        if done:
            stay = str(len(done) < len(rows)).lower()
            counters.add("denoise_leaves_total", len(done), running=stay)


def _finished(job: Job, frames: torch.Tensor) -> torch.Tensor:
    frames = frames.cpu()
    return frames if job.origin is None else job.origin.finish(frames)
