"""A job inside the engine, and its rows: one row is one picture or clip with a seed of its own."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.params import ResolvedParams

if TYPE_CHECKING:
    import torch

    from sgl_diffusion.components.samplers import Solver, SolverState
    from sgl_diffusion.engine.beginning import Origin
    from sgl_diffusion.engine.lora.rows import Blend
    from sgl_diffusion.engine.previews import Preview

_order = itertools.count()


@dataclass(eq=False)
class Row:
    """`step` counts finished steps, and skipped ones where a picture was the beginning; `state`
    holds latents and solver history of this row alone, `noise` what was drawn for it, as long as
    parts of a picture are kept."""

    job: Job
    seed: int
    state: SolverState | None = None
    noise: torch.Tensor | None = None
    step: int = 0
    previews: deque[Preview] = field(default_factory=deque)
    chunks: Iterator[torch.Tensor] | None = None
    frames: list[torch.Tensor] = field(default_factory=list)
    decoded: bool = False

    @property
    def denoised(self) -> bool:
        return self.step == self.job.params.num_inference_steps

    @property
    def ran(self) -> int:
        return self.step - self.job.params.start_step

    @property
    def to_decode(self) -> bool:
        return bool(self.previews) or (self.denoised and not self.decoded)


@dataclass(eq=False)
class Job:
    id: str
    params: ResolvedParams
    rows: list[Row] = field(default_factory=list)
    solver: Solver | None = None
    condition: Any = None
    negative: Any = None
    blend: Blend | None = None  # the adapters that are applied to its rows
    epoch: int = 0  # of the weights it runs with
    origin: Origin | None = None
    cancelled: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    order: int = field(default_factory=lambda: next(_order))

    def __post_init__(self) -> None:
        start = self.params.start_step
        self.rows = [Row(self, seed, step=start) for seed in self.params.seeds]

    @property
    def encoded(self) -> bool:
        return self.solver is not None

    @property
    def step(self) -> int:
        """Finished steps of the row that is furthest behind."""
        return min(row.ran for row in self.rows)

    @property
    def steps(self) -> int:
        """How many steps there are to run."""
        return self.params.num_inference_steps - self.params.start_step

    @property
    def shape(self) -> tuple[int, ...]:
        """Jobs of one shape compete for the same batches."""
        params = self.params
        return params.width, params.height, params.num_frames

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
