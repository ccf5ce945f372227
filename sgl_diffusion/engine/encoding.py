"""What a job gets before its first step: conditions, noise, and the picture it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgl_diffusion.components.samplers import Solver, SolverState
from sgl_diffusion.engine.beginning import Origin, first_state
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.pictures import open_picture
from sgl_diffusion.engine.pipeline import Condition, KeepsPicture, Pipeline
from sgl_diffusion.engine.prompts import PromptCache

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Encoded:
    """All that a job needs for its first step; `noises` where parts of a picture are kept."""

    solver: Solver
    condition: Condition
    negative: Condition
    origin: Origin | None
    states: tuple[SolverState, ...]
    noises: tuple[Tensor, ...] | None

    def give(self, job: Job) -> None:
        job.condition, job.negative, job.origin = self.condition, self.negative, self.origin
        for number, row in enumerate(job.rows):
            row.state = self.states[number]
            row.noise = None if self.noises is None else self.noises[number]
        job.solver = self.solver


class Encoding:
    def __init__(self, pipeline: Pipeline, prompts: PromptCache) -> None:
        self._pipeline = pipeline
        self._prompts = prompts

    @torch.inference_mode()
    def encode(self, job: Job) -> Encoded:
        """It changes nothing, neither the job nor anything that a step looks at."""
        pipeline, params = self._pipeline, job.params
        solver = pipeline.solver(params)
        assert solver.start == params.start_step, "the recipe's solver begins somewhere else"
        pictures = [open_picture(path) for path in params.images]
        native = pipeline.card.edits == "native"
        origin = None
        if pictures and (not native or params.mask is not None):
            origin = Origin.of(pipeline, params, pictures[0])
        parts = pictures if native else []
        condition = self._condition(job, params.prompt, parts)
        negative = self._condition(job, params.negative_prompt, parts) if params.guided else None
        if origin is None and isinstance(pipeline, KeepsPicture):
            origin = pipeline.origin(condition, params)
        noises = tuple(pipeline.noise(params, row.seed) for row in job.rows)
        states = tuple(first_state(origin, noise, solver) for noise in noises)
        kept = origin is not None and origin.keep is not None
        shown = tuple(noise.float() for noise in noises) if kept else None
        return Encoded(solver, condition, negative, origin, states, shown)

    def _condition(self, job: Job, prompt: str, pictures: Sequence[Image]) -> Condition:
        encode = partial(self._pipeline.encode, prompt, job.params, pictures)
        return self._prompts.get(job, prompt, encode)
