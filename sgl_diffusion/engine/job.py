"""A job inside the engine, and its rows: one row is one picture or clip with a seed of its own."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sgl_diffusion.base.params import DEFAULT_PRIORITY, ResolvedParams

if TYPE_CHECKING:
    import torch

    from sgl_diffusion.components.samplers import Solver, SolverState
    from sgl_diffusion.engine.beginning import Origin
    from sgl_diffusion.engine.lora.rows import Blend
    from sgl_diffusion.engine.previews import Preview
    from sgl_diffusion.engine.step_cache import Memory

_order = itertools.count()

Group = tuple[int, int, int, bool]


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
    memory: Memory | None = None  # of an earlier step, where steps may reuse one
    gap: torch.Tensor | None = None  # what the prompt changed in its velocity, where that is kept
    reused: int = 0  # so many did

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
    """By its `deadline` it should be done, a moment of the monotonic clock; `away` says what
    another thread does with it now, beside its steps, and `in_lane` whether one makes a step of it;
    with `packs` its steps can be shared with other sizes. `apart` is set when a step that it shared
    has failed, until it has made that step without others."""

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
    deadline: float = field(default_factory=time.monotonic)
    away: Literal["", "encode", "decode"] = ""
    in_lane: bool = False
    packs: bool = False
    apart: bool = False

    def __post_init__(self) -> None:
        start = self.params.start_step
        self.rows = [Row(self, seed, step=start) for seed in self.params.seeds]

    @property
    def encoded(self) -> bool:
        return self.solver is not None

    @property
    def begun(self) -> bool:
        """It has memory of its own by now."""
        return self.encoded or bool(self.away)

    @property
    def step(self) -> int:
        """Finished steps, on average of its rows."""
        return sum(row.ran for row in self.rows) // len(self.rows)

    @property
    def steps(self) -> int:
        """How many steps there are to run."""
        return self.params.num_inference_steps - self.params.start_step

    @property
    def group(self) -> Group:
        """Jobs of one group compete for the same batches."""
        params = self.params
        if self.packs:
            return 0, 0, params.num_frames, params.guided
        return params.width, params.height, params.num_frames, params.guided

    @property
    def size(self) -> str:
        """For people: 832x480x81, or 1024x1024 where there is one frame."""
        params = self.params
        size = f"{params.width}x{params.height}"
        return size if params.num_frames == 1 else f"{size}x{params.num_frames}"

    @property
    def weight(self) -> float:
        """Its share of the time beside other jobs; every priority has twice that of the next."""
        return float(2.0 ** (self.params.priority - DEFAULT_PRIORITY))

    @property
    def to_denoise(self) -> list[Row]:
        return [row for row in self.rows if not row.denoised]

    @property
    def to_decode(self) -> bool:
        return self.encoded and any(row.to_decode for row in self.rows)

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
