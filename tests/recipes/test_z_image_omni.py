"""Served Z-Image Omni models, through the whole engine, against diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.oracles import images as oracle
from tests.recipes.parity import (
    NEGATIVE,
    PROMPT,
    assert_equal,
    keep_full_precision,
    opened,
    run,
    together,
    unpacked,
)


@pytest.fixture(scope="module", params=["tiny_z_image_omni_a", "tiny_z_image_omni_b"])
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Any]:
    path: Path = request.getfixturevalue(request.param)
    theirs = oracle.pipeline(path)
    keep_full_precision(theirs)
    return opened(path), theirs


def pictures(folder: Path, count: int) -> tuple[list[Image.Image], tuple[str, ...]]:
    """Some that fit the VAE and some that are cut."""
    generator = torch.Generator().manual_seed(0)
    drawn, files = [], []
    for number, size in enumerate([(130, 96), (80, 150)][:count]):
        small = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        drawn.append(Image.fromarray(small.numpy()).resize(size))
        files.append(str(folder / f"{number}.png"))
        drawn[-1].save(files[-1])
    return drawn, tuple(files)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(("guidance", "width", "height"), [(0.0, 80, 48), (4.0, 64, 128)])
def test_latents_and_pixels_equal_diffusers(
    both: tuple[Pipeline, Any],
    tmp_path: Path,
    guidance: float,
    width: int,
    height: int,
    count: int,
) -> None:
    """Prompt and negative prompt have different lengths, and share the batch."""
    ours, theirs = both
    drawn, files = pictures(tmp_path, count)
    call = {
        "width": width,
        "height": height,
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "negative_prompt": NEGATIVE,
    }
    got = run(ours, prompt=PROMPT, seed=11, images=files, **call)
    given = {"image": drawn} if drawn else {}
    assert_equal(got, oracle.run(theirs, PROMPT, seed=11, **given, **call))
    if drawn:
        plain = run(ours, prompt=PROMPT, seed=11, **call)
        assert (got[0] - plain[0]).abs().max() > 0.1, "the pictures matter"


def test_large_pictures_are_brought_to_the_size_of_the_new_one(
    both: tuple[Pipeline, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both
    small = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    large = Image.fromarray(small.numpy()).resize((1200, 960))
    large.save(tmp_path / "in.png")
    call = {"width": 112, "height": 80, "num_inference_steps": 2, "guidance_scale": 0.0}
    got = run(ours, prompt=PROMPT, seed=3, images=(str(tmp_path / "in.png"),), **call)
    assert_equal(got, oracle.run(theirs, PROMPT, seed=3, image=[large], **call))


@pytest.mark.parametrize("count", [0, 1])
def test_prompts_of_different_length_share_a_batch(
    both: tuple[Pipeline, Any], tmp_path: Path, count: int
) -> None:
    ours, theirs = both
    drawn, files = pictures(tmp_path, count)
    call = {"width": 48, "height": 64, "num_inference_steps": 3, "guidance_scale": 0.0}
    # The two in the middle fill as many tokens, but not with as many words.
    prompts = {"long": f"{PROMPT} " * 3, "short": "a car", "other": "a small black car"}
    latents = together(ours, prompts, seed=5, images=files, **call)
    given = {"image": drawn} if drawn else {}
    for name, prompt in prompts.items():
        expected, _ = oracle.run(theirs, prompt, seed=5, **given, **call)
        assert (latents[name] - unpacked(expected, like=latents[name])).abs().max() <= 1e-4


def test_a_plain_pipeline_with_such_a_transformer_goes_through_diffusers(
    tiny_z_image_omni_a: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for part in tiny_z_image_omni_a.iterdir():
        if part.is_dir():
            (copy / part.name).symlink_to(part)
    index = (tiny_z_image_omni_a / "model_index.json").read_text()
    (copy / "model_index.json").write_text(index.replace("ZImageOmniPipeline", "ZImagePipeline"))
    served = open_pipeline(EngineOptions(model_path=str(copy)), lambda note: None)
    assert isinstance(served, WholePipeline)
