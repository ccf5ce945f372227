"""The fallback runner: jobs of a pipeline that only runs from end to end, one after the other.

Messages are taken in at every step of the pipeline, so progress, cancelling and heartbeats work as
in the native runner; batching over jobs does not exist here.
"""

from __future__ import annotations

import time
from collections import OrderedDict

import torch

from sgl_diffusion.base.errors import CancelledError
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.lora.rows import RowAdapters
from sgl_diffusion.engine.pipeline import WholePipeline
from sgl_diffusion.engine.shared import Fail
from sgl_diffusion.engine.step_times import StepTimes
from sgl_diffusion.engine.steps import Finish
from sgl_diffusion.engine.trace import Trace
from sgl_diffusion.orchestrator.stage import Outbox


class WholeRunner:
    def __init__(self, pipeline: WholePipeline, outbox: Outbox, finish: Finish, fail: Fail) -> None:
        self._pipeline = pipeline
        self._outbox = outbox
        self._finish = finish
        self._fail = fail
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self.adapters = RowAdapters(torch.device(pipeline.card.device))
        self.counters = Counters()
        self._step_times = StepTimes(self.counters, pipeline.card.name)
        self.trace = Trace(torch.device(pipeline.card.device))

    def add(self, job: Job) -> None:
        self._jobs[job.id] = job

    def drop(self, job_id: str) -> Job | None:
        job = self._jobs.pop(job_id, None)
        if job is not None:
            job.cancelled = True
        return job

    def running(self) -> int:
        return len(self._jobs)

    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    def step(self) -> bool:
        """The whole of the oldest job."""
        job = next(iter(self._jobs.values()), None)
        if job is None:
            return False
        start = time.perf_counter()

        done, since = 0, start

        def on_step(step: int, total: int) -> None:
            nonlocal done, since
            if step > done:  # a slow step is told more than once
                now = time.perf_counter()
                if done:  # before the end of the first one there was more than a step
                    self._step_times.add([job.params], (now - since) / (step - done))
                self.trace.add("denoise", since, now, jobs=[job.id], size=job.size)
                done, since = step, now
            self._outbox.progress(job.id, step, total, "denoise")
            self._outbox.poll()
            if job.cancelled:
                raise CancelledError("The job was cancelled.")

        def on_partial(index: int, row: int, step: int, frames: torch.Tensor) -> None:
            meta = {"partial": index, "row": row, "step": step}
            self._outbox.output(job.id, meta, [frames.cpu()], final=False)

        try:
            whole = self.trace.span("whole", jobs=[job.id], size=job.size)
            with whole, self.adapters.of([job.blend]):
                clips = self._pipeline.run(job.params, on_step, on_partial)
        except Exception as error:
            if not job.cancelled:
                self._fail([job], error)
            return True
        seconds = time.perf_counter() - start
        job.spend("whole", seconds)
        self.counters.add("phase_seconds_total", seconds, phase="whole")
        if self.drop(job.id) is not None:
            self._finish(job, clips)
        return True
