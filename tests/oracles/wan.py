"""What diffusers makes of a Wan checkpoint: the oracle of the parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def pipeline(path: Path) -> Any:
    """The WanPipeline of a repository folder, fp32 on the CPU."""
    from diffusers import WanPipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    pipe = WanPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, prompt: str, *, seed: int, **call: Any) -> tuple[Tensor, Tensor]:
    """The final latents [1, C, T, h, w] of one call, and its clip as uint8 [F, H, W, 3]."""
    seen = {}

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict:
        seen["latents"] = tensors["latents"]
        return {}

    generator = torch.Generator().manual_seed(seed)
    video = pipe(
        prompt, generator=generator, output_type="np", callback_on_step_end=keep, **call
    ).frames[0]
    return seen["latents"], torch.from_numpy((video * 255).round()).to(torch.uint8)


def latents(pipe: Any, prompt: str, *, seed: int, **call: Any) -> Tensor:
    """The final latents of one call, undecoded."""
    generator = torch.Generator().manual_seed(seed)
    result: Tensor = pipe(prompt, generator=generator, output_type="latent", **call).frames
    return result
