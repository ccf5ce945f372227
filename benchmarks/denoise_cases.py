"""One denoise step of real blocks with random weights: our engine beside diffusers.

The widths, heads and token counts are those of the models; of their equal blocks a few are built,
so that a case fits in a minute. Both sides have the same weights and make the same step: forward
passes, guidance, Euler's update. diffusers guides by two passes, the engine by one batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion import ops
from sgl_diffusion.attention import AttentionContext, select
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.components.samplers import SolverState, make_solver
from sgl_diffusion.engine.denoise import denoise, shape_key
from sgl_diffusion.engine.job import Job
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.loader.weights import load_weights
from sgl_diffusion.models import flux, flux_weights, wan, wan_weights

STEPS, GUIDANCE = 20, 5.0
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
    family: str  # wan or flux
    config: dict[str, Any]  # of diffusers' transformer
    latents: tuple[int, ...]  # [C, T, h, w] of one row
    text: int  # tokens
    whole: str  # what a whole model has of the blocks that are built here


def _wan(name: str, heads: int, ffn: int, layers: int, of: int) -> Case:
    config = {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers}
    return Case(name, "wan", config, (16, 21, 60, 104), 512, f"{layers} of {of} blocks")


CASES = (
    _wan("Wan 1.3B 480p", 12, 8960, 4, 30),
    _wan("Wan 14B 480p", 40, 13824, 2, 40),
    Case(
        "FLUX.1 1024",
        "flux",
        {"num_layers": 4, "num_single_layers": 8, "guidance_embeds": True},
        (16, 1, 128, 128),
        512,
        "4 of 19 and 8 of 38 blocks",
    ),
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
)


class _Velocity:
    """What one denoise step asks of a pipeline."""

    combine = None

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device

    def text_bucket(self, condition: Any) -> int:
        return 0

    def expert(self, timestep: float) -> int:
        return 0

    def velocity(self, latents: Tensor, timesteps: Tensor, context: Any, expert: int) -> Tensor:
        result: Tensor = self.model(latents, timesteps, context)
        return result


class Step:
    """One case on one device: `ours` and `theirs` each make the first step of the same latents."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.dtype = case, device, dtype
        self.guided = case.family == "wan"
        with tempfile.TemporaryDirectory() as folder:
            made = self._diffusers()
            made.save_pretrained(folder)
            # As a pipeline is loaded: some parameters stay in fp32.
            loaded = type(made).from_pretrained(folder, torch_dtype=dtype)
            self._theirs = loaded.to(device).eval()
            self.model = self._native(Path(folder))
        self.compiled: Callable[..., Any] | None = None
        self.noise = torch.randn(1, *case.latents, device=device)
        self.text = torch.randn(2, case.text, self._text_width, device=device).to(dtype)
        self.pooled = torch.randn(1, self._theirs.config.get("pooled_projection_dim", 1)).to(device)
        self.pooled = self.pooled.to(dtype)
        self._pipeline = _Velocity(self.model, device)
        self._solver = make_solver(SCHEDULER, STEPS)
        self._context = self._prepare()

    @property
    def _text_width(self) -> int:
        config = self._theirs.config
        return int(config["text_dim" if self.case.family == "wan" else "joint_attention_dim"])

    def _diffusers(self) -> Any:
        from diffusers import FluxTransformer2DModel, WanTransformer3DModel

        made = {"wan": WanTransformer3DModel, "flux": FluxTransformer2DModel}
        with torch.device(self.device):
            model = made[self.case.family](**self.case.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Weights that keep the size of their input; others near what they start from.
                if parameter.ndim > 1 and "table" not in name:
                    parameter.normal_(std=(parameter[0].numel()) ** -0.5)
                elif "norm" not in name:
                    parameter.normal_(std=0.02)
        return model

    def _native(self, folder: Path) -> nn.Module:
        config = read_config(folder)
        model: nn.Module
        with torch.device("meta"):
            if self.case.family == "wan":
                model = wan.WanTransformer(wan.WanParams.from_config(config))
                rules = wan_weights.RULES
            else:
                model = flux.FluxTransformer(flux.FluxParams.from_config(config))
                rules = flux_weights.RULES
        load_weights(model, folder, rules, dtype=self.dtype, device=self.device)
        return model.eval()

    @torch.inference_mode()
    def _prepare(self) -> Any:
        if self.guided:
            return self.model.prepare(self.text)  # type: ignore[operator]
        return self.model.prepare(self.text[:1], self.pooled, GUIDANCE)  # type: ignore[operator]

    def attend(self, backend: str) -> None:
        chosen = select(
            backend,
            device=self.device,
            head_dim=self.model.params.attention_head_dim,  # type: ignore[union-attr,arg-type]
            dtype=self.dtype,
        )
        self.model.attention = AttentionContext.on_one_rank(chosen)

    def ours(self, *, named: bool = False) -> Tensor:
        """The latents after one step through the engine."""
        scale = GUIDANCE if self.guided else 1.0
        params = ResolvedParams(
            prompt="",
            negative_prompt="",
            width=0,
            height=0,
            num_frames=1,
            fps=1,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            flow_shift=None,
            max_sequence_length=self.case.text,
            seeds=(0,),
        )
        job = Job("bench", params, solver=self._solver, condition=self._context)
        (row,) = job.rows
        row.state = SolverState.start(self.noise)
        key = shape_key(self._pipeline, row)  # type: ignore[arg-type]
        with ops.using(**NAMED) if named else nullcontext():
            denoise(self._pipeline, key, [row], self._context)  # type: ignore[arg-type]
        return row.state.x

    @torch.inference_mode()
    def theirs(self, *, compiled: bool = False) -> Tensor:
        """The latents after the step that a diffusers pipeline makes."""
        if compiled and self.compiled is None:
            self.compiled = torch.compile(self._theirs)
        model = self.compiled if compiled and self.compiled else self._theirs
        timestep = self._solver.timesteps[:1].to(self.device)
        sigma, following = self._solver.sigma(0), self._solver.sigma(1)
        call = self._wan_pass if self.guided else self._flux_pass
        velocity = call(model, timestep, 0).float()
        if self.guided:
            without = call(model, timestep, 1).float()
            velocity = without + GUIDANCE * (velocity - without)
        return self.noise + (following - sigma) * velocity

    def _wan_pass(self, model: Any, timestep: Tensor, prompt: int) -> Tensor:
        text = self.text[prompt : prompt + 1]
        latents = self.noise.to(self.dtype)
        result: Tensor = model(latents, timestep, text, return_dict=False)[0]
        return result

    def _flux_pass(self, model: Any, timestep: Tensor, prompt: int) -> Tensor:
        channels, _, high, wide = self.case.latents
        grid = (high // 2, wide // 2)
        packed = self.noise[:, :, 0].to(self.dtype).unflatten(3, (grid[1], 2))
        packed = packed.unflatten(2, (grid[0], 2)).permute(0, 2, 4, 1, 3, 5)
        ids = torch.zeros(*grid, 3, device=self.device)
        ids[..., 1] += torch.arange(grid[0], device=self.device)[:, None]
        ids[..., 2] += torch.arange(grid[1], device=self.device)
        result: Tensor = model(
            hidden_states=packed.flatten(3).flatten(1, 2),
            timestep=timestep.to(self.dtype) / 1000,
            guidance=torch.full((1,), GUIDANCE, device=self.device, dtype=self.dtype),
            pooled_projections=self.pooled,
            encoder_hidden_states=self.text[:1],
            txt_ids=torch.zeros(self.case.text, 3, device=self.device),
            img_ids=ids.flatten(0, 1),
            return_dict=False,
        )[0]
        result = result.unflatten(2, (channels, 2, 2)).unflatten(1, grid)
        return result.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[:, :, None]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
