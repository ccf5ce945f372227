"""A native runner without a process around it: jobs in, final latents, frames and errors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_diffusion.base.params import ResolvedParams, SamplingParams
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.costs import Costs, Share, Waiting
from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.steps import StepRunner
from tests.engine.outbox import RecordingOutbox


class Together(Costs):
    """As if a step took as long for many rows as for one: whoever can share a batch does."""

    def share(
        self, key: ShapeKey, waiting: Sequence[Waiting], most: int, lanes: int = 1, company: int = 0
    ) -> Share:
        return Share(min(sum(one.rows for one in waiting), most))

    def estimate(self, params: ResolvedParams) -> float:
        return 0.0


class InLanes(Costs):
    """As if lanes always paid: every job by itself, whenever there are others."""

    def share(
        self, key: ShapeKey, waiting: Sequence[Waiting], most: int, lanes: int = 1, company: int = 0
    ) -> Share:
        return Share(min(waiting[0].rows, most), lanes if len(waiting) + company > 1 else 1)

    def estimate(self, params: ResolvedParams) -> float:
        return 0.0


class Bench:
    """A runner with a recorder: final latents and errors by job. What it does depends on no clock:
    one thing after the other, batches as large as they can be."""

    def __init__(
        self, pipeline: Pipeline, max_rows: int = 8, *, overlap: bool = False, **more: int
    ) -> None:
        self.pipeline = pipeline
        self.outbox = RecordingOutbox()
        self.latents: dict[str, list[torch.Tensor]] = {}
        self.errors: dict[str, Exception] = {}
        bounds = Bounds(rows=max_rows, overlap=overlap, **more)
        self.runner = StepRunner(pipeline, bounds, self.outbox, self._finish, self._fail)
        self.runner.sizes.costs = Together()

    def add(self, name: str, **wish: object) -> Job:
        params = self._resolve(**wish)
        job = Job(name, params)
        self.runner.add(job)
        return job

    def _resolve(self, **wish: object) -> ResolvedParams:
        small = {"prompt": "a cat", "width": 48, "height": 32, "num_frames": 5}
        wished = SamplingParams(**{**small, "num_inference_steps": 6, **wish})  # type: ignore[arg-type]
        return self.pipeline.card.resolve(wished, video=wished.num_frames != 1)

    def run(self) -> None:
        """Until idle; the latents of each row are kept as its decoding begins."""
        while self.runner.step():
            self.look()

    def look(self) -> None:
        for job in self.runner.jobs():
            if job.encoded and job.step == job.steps:
                rows = [row.state.x for row in job.rows if row.state is not None]
                if len(rows) == len(job.rows):
                    self.latents[job.id] = rows

    def _finish(self, job: Job, clips: list[torch.Tensor]) -> None:
        self.outbox.output(job.id, {"seconds": job.seconds}, list(clips))

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            self.runner.drop(job.id)
            self.errors[job.id] = error

    def count(self, name: str, **labels: str) -> float:
        return sum(
            metric.value
            for metric in self.runner.counters.metrics()
            if metric.name == name and labels.items() <= metric.labels.items()
        )
