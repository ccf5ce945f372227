"""One denoise step of real blocks with random weights: our engine beside diffusers.

The widths, heads and token counts are those of the models; of their equal blocks a few are built,
so that a case fits in a minute. Both sides have the same weights and make the same step: forward
passes, guidance, Euler's update. diffusers guides by two passes, the engine by one batch.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from benchmarks.denoise_families import FAMILIES, GUIDANCE, Family, empty
from sgl_diffusion import ops
from sgl_diffusion.attention import AttentionContext, select
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.bench.case import Bar
from sgl_diffusion.components.samplers import SolverState, make_solver
from sgl_diffusion.engine.denoise import denoise, shape_key
from sgl_diffusion.engine.job import Job
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.loader.weights import load_weights

STEPS = 20
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
# The GPU kernels that no result file has made automatic yet.
NAMED = {
    "norm_modulate": "cuda",
    "gate_residual_norm_modulate": "cuda",
    "qk_norm_rope": "cuda",
    "gate_residual": "triton",
    "gelu_tanh": "triton",
    "silu_mul": "triton",
    "cfg_combine_step": "triton",
}


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    config: dict[str, Any]  # of diffusers' transformer
    latents: tuple[int, ...]  # [C, T, h, w] of one row
    text: int  # tokens
    whole: str  # what a whole model has of the blocks that are built here
    eager: Bar | None = None  # how many times as fast as diffusers
    compiled: Bar | None = None

    @property
    def tokens(self) -> int:
        _, frames, high, wide = self.latents
        return frames * (high // 2) * (wide // 2)


def _wan(name: str, heads: int, ffn: int, layers: int, of: int, latents: tuple[int, ...]) -> Case:
    config = {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers}
    return Case(name, "wan", config, latents, 512, f"{layers} of {of} blocks")


def _flux(double: int, single: int, side: int) -> Case:
    config = {"num_layers": double, "num_single_layers": single, "guidance_embeds": True}
    whole = f"{double} of 19 and {single} of 38 blocks"
    return Case(f"FLUX.1 {8 * side}", "flux", config, (16, 1, side, side), 512, whole)


def _z_image(layers: int, refiners: int, side: int) -> Case:
    config = {"n_layers": layers, "n_refiner_layers": refiners}
    whole = f"{layers} of 30 layers and {refiners} of 2 refiners"
    return Case(f"Z-Image {8 * side}", "z_image", config, (16, 1, side, side), 64, whole)


CASES = (
    _wan("Wan 1.3B 480p", 12, 8960, 4, 30, (16, 21, 60, 104)),
    _wan("Wan 14B 480p", 40, 13824, 2, 40, (16, 21, 60, 104)),
    _flux(4, 8, 128),
    _z_image(8, 1, 128),
)
CPU_CASES = (
    replace(
        _wan("Wan 1.3B 480p frame", 12, 8960, 2, 30, (16, 1, 60, 104)),
        eager=Bar(1.3, 1.5),
        compiled=Bar(1.15, 1.35),
    ),
    replace(
        _wan("Wan 1.3B 512p 13 frames", 12, 8960, 2, 30, (16, 4, 64, 64)),
        eager=Bar(1.6, 1.9),
        compiled=Bar(1.4, 1.7),
    ),
    _flux(1, 2, 64),
    _z_image(2, 1, 64),
)
SMALL = (
    replace(
        CASES[0],
        name="Wan small",
        config={"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2},
        latents=(16, 2, 6, 10),
        text=9,
    ),
    replace(
        CASES[2],
        name="FLUX small",
        config={
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "axes_dims_rope": (16, 24, 24),
            "joint_attention_dim": 48,
            "pooled_projection_dim": 24,
            "guidance_embeds": True,
        },
        latents=(16, 1, 8, 12),
        text=9,
    ),
    replace(
        CASES[3],
        name="Z-Image small",
        config={
            "dim": 128,
            "n_heads": 2,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "cap_feat_dim": 48,
            "axes_dims": (16, 24, 24),
        },
        latents=(16, 1, 8, 12),
        text=9,
    ),
)


class Velocity:
    """What one denoise step asks of a pipeline."""

    combine = None

    def __init__(self, model: Callable[..., Tensor], device: torch.device) -> None:
        self.model, self.device = model, device

    def text_bucket(self, condition: Any) -> int:
        return 0

    def expert(self, timestep: float) -> int:
        return 0

    def velocity(self, latents: Tensor, timesteps: Tensor, context: Any, expert: int) -> Tensor:
        return self.model(latents, timesteps, context)


class Step:
    """One case on one device: `ours` and `theirs` each make the first step of the same latents."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.dtype = case, device, dtype
        made = self._random(FAMILIES[case.family].theirs)
        self.family: Family = FAMILIES[case.family].of(made.config, case.text, device, dtype)
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            # As a pipeline is loaded: some parameters stay in fp32.
            loaded = type(made).from_pretrained(folder, torch_dtype=dtype)
            del made
            self.peer = loaded.to(device).eval()
            self.model = self._native(Path(folder))
        self.noise = torch.randn(1, *case.latents, device=device)
        self._solver = make_solver(SCHEDULER, STEPS)
        self._scheduler = FlowMatchEulerDiscreteScheduler()
        self._scheduler.set_timesteps(STEPS, device=device)
        with torch.inference_mode():
            self._context = self.family.prepare(self.model)

    @cached_property
    def compiled(self) -> Any:
        return torch.compile(self.peer)

    @torch.no_grad()
    def _random(self, theirs: Any) -> Any:
        with torch.device(self.device):
            model = theirs(**self.case.config)
        for name, parameter in model.named_parameters():
            # Weights that keep the size of their input; others near what they start from.
            if parameter.ndim > 1 and "table" not in name:
                parameter.normal_(std=(parameter[0].numel()) ** -0.5)
            elif "norm" not in name:
                parameter.normal_(std=0.02)
        return model

    def _native(self, folder: Path) -> nn.Module:
        with torch.device("meta"):
            model = self.family.native(read_config(folder))
        load_weights(model, folder, self.family.rules, dtype=self.dtype, device=self.device)
        return model.eval()

    @contextmanager
    def without_blocks(self) -> Iterator[None]:
        """What is left is done once a step, however many blocks a model has."""
        ours, theirs = self.family.lists
        context = self._context
        with empty(self.model, ours), empty(self.peer, theirs):
            self._context = self.family.ends(context)
            try:
                yield
            finally:
                self._context = context

    def attend(self, backend: str) -> None:
        chosen = select(
            backend,
            device=self.device,
            head_dim=self.model.params.attention_head_dim,  # type: ignore[union-attr,arg-type]
            dtype=self.dtype,
        )
        self.model.attention = AttentionContext.on_one_rank(chosen)

    def ours(self, *, named: bool = False, velocity: Callable[..., Tensor] | None = None) -> Tensor:
        """The latents after one step through the engine; `velocity` stands for the model."""
        guided = self.family.guided
        params = ResolvedParams(
            prompt="",
            negative_prompt="",
            width=0,
            height=0,
            num_frames=1,
            fps=1,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE if guided else 1.0,
            flow_shift=None,
            max_sequence_length=self.case.text,
            seeds=(0,),
        )
        job = Job("bench", params, solver=self._solver, condition=self._context)
        (row,) = job.rows
        row.state = SolverState.start(self.noise)
        pipeline = Velocity(velocity or self.model, self.device)
        key = shape_key(pipeline, row)  # type: ignore[arg-type]
        with ops.using(**NAMED) if named else nullcontext():
            denoise(pipeline, key, [row], self._context)  # type: ignore[arg-type]
        return row.state.x

    def velocity_like(self) -> Tensor:
        """A tensor as the model returns it in a step."""
        passes = 2 if self.family.guided else 1
        return self.noise.expand(passes, *self.case.latents).to(self.dtype)

    @torch.inference_mode()
    def theirs(self, *, compiled: bool = False) -> Tensor:
        """The latents after the step that a diffusers pipeline makes."""
        model = self.compiled if compiled else self.peer
        scheduler = copy.copy(self._scheduler)
        timestep = scheduler.timesteps[:1]
        latents = self.noise.to(self.dtype)
        velocity = self.family.call(model, latents, timestep, 0).float()
        if self.family.guided:
            without = self.family.call(model, latents, timestep, 1).float()
            velocity = without + GUIDANCE * (velocity - without)
        stepped: Tensor = scheduler.step(velocity, timestep[0], self.noise, return_dict=False)[0]
        return stepped


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
