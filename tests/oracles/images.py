"""What diffusers makes of an image checkpoint: the oracle of the families' parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def pipeline(path: Path, **parts: Any) -> Any:
    """The pipeline that a repository folder names, fp32 on the CPU."""
    from diffusers import DiffusionPipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(path, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    _encode_exactly(pipe.vae)
    return pipe


def _encode_exactly(vae: Any) -> None:
    """Pictures from Pillow are channels-last, for which torch's group norm is off by 1e-3 on a CPU;
    the oracle gets them in the order in which it is exact."""
    encode = vae.encode

    def exact(x: Tensor, **options: Any) -> Any:
        return encode(x.contiguous(), **options)

    vae.encode = exact


def run(pipe: Any, prompt: str, *, seed: int, **call: Any) -> tuple[Tensor, Tensor]:
    """The final latents of a call, as the pipeline keeps them, and its picture, uint8 [H, W, 3]."""
    seen = {}

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict:
        seen["latents"] = tensors["latents"]
        return {}

    generator = torch.Generator().manual_seed(seed)
    picture = pipe(
        prompt=prompt, generator=generator, output_type="np", callback_on_step_end=keep, **call
    ).images[0]
    return seen["latents"], torch.from_numpy((picture * 255).round()).to(torch.uint8)
