"""Served FLUX.2 models, through the whole engine, against diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes import flux2
from sgl_diffusion.recipes.image import cropped, shrunk
from tests.oracles import images as oracle
from tests.recipes.parity import PROMPT, assert_equal, opened, run, together, unpacked

LENGTH = 160  # tokens, system message included


@pytest.fixture(
    scope="module", params=["tiny_flux2_dev", "tiny_flux2_klein_base", "tiny_flux2_klein"]
)
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Any]:
    path: Path = request.getfixturevalue(request.param)
    return opened(path), oracle.pipeline(path)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize(("width", "height"), [(160, 96), (128, 128)])
def test_latents_and_pixels_equal_diffusers(
    both: tuple[Pipeline, Any], guidance: float, width: int, height: int
) -> None:
    ours, theirs = both
    call = {
        "width": width,
        "height": height,
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "max_sequence_length": LENGTH,
    }
    got = run(ours, prompt=PROMPT, seed=11, **call)
    assert_equal(got, oracle.run(theirs, PROMPT, seed=11, **call))


def test_two_prompts_of_different_length_share_a_batch(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    call = {"width": 96, "height": 64, "num_inference_steps": 3, "max_sequence_length": LENGTH}
    call["guidance_scale"] = 1.0
    prompts = {"long": PROMPT, "short": "a car"}
    latents = together(ours, prompts, seed=5, **call)
    for name, prompt in prompts.items():
        expected, _ = oracle.run(theirs, prompt, seed=5, **call)
        assert (latents[name] - unpacked(expected, like=latents[name])).abs().max() <= 1e-4


@pytest.mark.parametrize("count", [1, 2])
def test_edits_equal_diffusers(both: tuple[Pipeline, Any], tmp_path: Path, count: int) -> None:
    """Pictures that fit the VAE and pictures that are cut."""
    ours, theirs = both
    generator = torch.Generator().manual_seed(0)
    pictures, files = [], []
    for number, size in enumerate([(130, 96), (80, 150)][:count]):
        small = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        pictures.append(Image.fromarray(small.numpy()).resize(size))
        files.append(str(tmp_path / f"{number}.png"))
        pictures[-1].save(files[-1])
    call = {
        "width": 96,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": LENGTH,
    }
    got = run(ours, prompt=PROMPT, seed=3, images=tuple(files), **call)
    assert_equal(got, oracle.run(theirs, PROMPT, seed=3, image=pictures, **call))


def test_large_references_are_brought_to_a_megapixel() -> None:
    fitted = cropped(shrunk(Image.new("RGB", (3000, 1000))), 16)
    assert fitted.width * fitted.height <= 1024 * 1024
    assert fitted.width % 16 == fitted.height % 16 == 0


@pytest.mark.parametrize("steps", [1, 10, 28, 200])
@pytest.mark.parametrize("tokens", [24, 4096, 4300, 4301, 16384])
def test_the_shift_of_the_schedule_equals_diffusers(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    assert flux2._mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-9)


def test_the_card_tells_which_model_it_is(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    distilled = theirs.config.get("is_distilled", False)
    assert ours.card.defaults.num_inference_steps == (4 if distilled else 50)
    assert (ours.card.edits, ours.card.max_images, ours.card.size_multiple) == ("native", 10, 16)
