"""Masks on models that read pictures natively: the outside stays the picture, the inside is new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sgl_diffusion.recipes import flux, qwen_image
from tests.checkpoints import tiny_flux, tiny_flux2, tiny_qwen_image, tiny_z_image
from tests.recipes.parity import opened, run

WIDTH, HEIGHT = 96, 64


def kontext(folder: Path) -> Path:
    return tiny_flux.build(folder, kind="FluxKontextPipeline")


def qwen_edit(folder: Path) -> Path:
    return tiny_qwen_image.build(folder, kind="QwenImageEditPlusPipeline")


def flux2_klein(folder: Path) -> Path:
    return tiny_flux2.build(folder, klein=True, distilled=True)


def z_image_omni(folder: Path) -> Path:
    return tiny_z_image.build(folder, omni=True)


@pytest.mark.parametrize("build", [kontext, qwen_edit, flux2_klein, z_image_omni])
def test_a_mask_keeps_the_outside(
    build: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux, "_TRAINED", [(WIDTH, HEIGHT)])
    monkeypatch.setattr(qwen_image, "_AREA", WIDTH * HEIGHT)
    monkeypatch.setattr(qwen_image, "_SMALL_AREA", WIDTH * HEIGHT)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "in.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, WIDTH // 2 :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    call = {
        "prompt": "a red fox",
        "width": WIDTH,
        "height": HEIGHT,
        "num_inference_steps": 3,
        "images": (str(tmp_path / "in.png"),),
    }
    pipeline = opened(build(tmp_path / "model"))
    free = run(pipeline, **call)[1]
    kept = run(pipeline, mask=str(tmp_path / "mask.png"), **call)[1]
    half = WIDTH // 2
    assert torch.equal(kept[:, :half], pixels[:, :half])
    assert (free[:, :half].int() - pixels[:, :half].int()).abs().float().mean() > 10
    assert (kept[:, half:].int() - pixels[:, half:].int()).abs().float().mean() > 10
