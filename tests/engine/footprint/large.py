"""Checkpoints of every family whose jobs take a gigabyte: few layers, real widths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def _replace(folder: Path, model: Any) -> None:
    """Another model in the place of a component; small numbers, so that nothing overflows."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=generator) / 50
    for parameter in model.parameters():
        for part in parameter.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    model.save_pretrained(folder)


def picture_vae(folder: Path) -> None:
    """The channels of the VAE of FLUX.1, SD3 and Z-Image."""
    from diffusers import AutoencoderKL

    small = AutoencoderKL.load_config(folder)
    wide = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}
    _replace(folder, AutoencoderKL.from_config({**small, **wide}))


def flux2_vae(folder: Path) -> None:
    from diffusers import AutoencoderKLFlux2

    small = AutoencoderKLFlux2.load_config(folder)
    wide = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}
    _replace(folder, AutoencoderKLFlux2.from_config({**small, **wide}))


def qwen_vae(folder: Path) -> None:
    from diffusers import AutoencoderKLQwenImage

    small = AutoencoderKLQwenImage.load_config(folder)
    _replace(folder, AutoencoderKLQwenImage.from_config({**small, "base_dim": 96}))


def wan_vae(folder: Path) -> None:
    from diffusers import AutoencoderKLWan

    small = AutoencoderKLWan.load_config(folder)
    _replace(folder, AutoencoderKLWan.from_config({**small, "base_dim": 96}))


VAES: dict[str, Callable[[Path], None]] = {
    "AutoencoderKL": picture_vae,
    "AutoencoderKLFlux2": flux2_vae,
    "AutoencoderKLQwenImage": qwen_vae,
    "AutoencoderKLWan": wan_vae,
}
