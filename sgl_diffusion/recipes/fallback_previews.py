"""Partial pictures of a diffusers pipeline: what its scheduler foresees, decoded by its VAE.

A pipeline hands out the noisy latents only. The scheduler sees the model's output, from which the
clean latents follow; so its `step` is watched while a job with partial pictures runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.components.pixels import to_frames

_FLOW = ("FlowMatchEulerDiscreteScheduler",)
_SIGMAS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_KEPT = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
_ALPHAS = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler")
_IMAGE_VAE = "AutoencoderKL"
_VIDEO_VAES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")


def can_preview(pipe: Any) -> bool:
    """Whether the clean latents of a step are known, and how to decode them."""
    scheduler, vae = getattr(pipe, "scheduler", None), getattr(pipe, "vae", None)
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    known = name in (*_FLOW, *_KEPT, *_ALPHAS)
    if name in _SIGMAS:
        known = config.get("prediction_type") == "epsilon"
    if name in _KEPT:
        known = bool(config.get("predict_x0", config.get("algorithm_type") == "dpmsolver++"))
    return known and type(vae).__name__ in (_IMAGE_VAE, *_VIDEO_VAES)


@contextmanager
def watched(pipe: Any) -> Iterator[Callable[[], Tensor | None]]:
    """While this is open, the function it gives returns the latest clean latents."""
    scheduler = pipe.scheduler
    original = scheduler.step
    latest: list[Tensor] = []

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **more: Any) -> Any:
        result = original(model_output, timestep, sample, *rest, **more)
        latest[:] = [_clean(scheduler, model_output, timestep, sample)]
        return result

    scheduler.step = step
    try:
        yield lambda: latest[0] if latest else None
    finally:
        del scheduler.step


def decode(pipe: Any, latents: Tensor, params: ResolvedParams) -> list[Tensor]:
    """One uint8 frame [1, H, W, 3] per row of `latents`, from the middle of a clip."""
    vae = pipe.vae
    if latents.dim() == 3:  # two by two cells are one token
        factor = pipe.vae_scale_factor
        latents = pipe._unpack_latents(latents, params.height, params.width, factor)
    latents = latents.to(vae.dtype)
    if type(vae).__name__ == _IMAGE_VAE:
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pictures = vae.decode(latents, return_dict=False)[0][:, :, None]
    else:
        shape = (1, -1, 1, 1, 1)
        middle = latents.shape[2] // 2
        latents = latents[:, :, middle : middle + 1]
        mean = latents.new_tensor(vae.config.latents_mean).view(shape)
        std = latents.new_tensor(vae.config.latents_std).view(shape)
        pictures = vae.decode(latents * std + mean, return_dict=False)[0]
    return [to_frames(picture[None]) for picture in pictures]


def _clean(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    name = type(scheduler).__name__
    if name in _KEPT:  # what it keeps for its next step is this
        clean: Tensor = scheduler.model_outputs[-1]
        return clean
    output, sample = output.float(), sample.float()
    if name in (*_FLOW, *_SIGMAS):
        sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)
        return sample - sigma * output
    share = scheduler.alphas_cumprod[int(timestep)].to(sample.device)
    signal, noise = share.sqrt(), (1 - share).sqrt()
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return signal * sample - noise * output
    return output if kind == "sample" else (sample - noise * output) / signal
