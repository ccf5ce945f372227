"""Served Z-Image models, through the whole engine, against diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.engine.pipeline import Pipeline
from tests.engine.bench import Bench
from tests.oracles import images as oracle
from tests.recipes.test_flux import opened, run

PROMPT = "a red fox sleeping in the garden, a small black car and a big green bird, oil painting"
NEGATIVE = "blurry"


@pytest.fixture(scope="module", params=["tiny_z_image_a", "tiny_z_image_b"])
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Any]:
    path: Path = request.getfixturevalue(request.param)
    return opened(path), oracle.pipeline(path)


@pytest.mark.parametrize("guidance", [0.0, 0.7, 4.0])
@pytest.mark.parametrize(("width", "height"), [(80, 48), (64, 128)])
def test_latents_and_pixels_equal_diffusers(
    both: tuple[Pipeline, Any], guidance: float, width: int, height: int
) -> None:
    """Prompt and negative prompt have different lengths, and share the batch."""
    ours, theirs = both
    call = {
        "width": width,
        "height": height,
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "negative_prompt": NEGATIVE,
    }
    latents, pixels = run(ours, prompt=PROMPT, seed=11, **call)
    their_latents, their_pixels = oracle.run(theirs, PROMPT, seed=11, **call)
    assert 0.3 < their_latents.std() < 10
    assert (latents[:, :, 0] - their_latents).abs().max() <= 1e-4
    assert (pixels.int() - their_pixels.int()).abs().max() <= 1


def test_prompts_of_different_length_share_a_batch(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    call = {"width": 48, "height": 64, "num_inference_steps": 3, "guidance_scale": 0.0}
    bench = Bench(ours)
    prompts = {"long": PROMPT, "short": "a car"}
    for name, prompt in prompts.items():
        bench.add(name, prompt=prompt, seed=5, num_frames=1, **call)
    bench.run()
    assert bench.count("denoise_forwards_total", rows="2") > 0
    for name, prompt in prompts.items():
        latents, _ = oracle.run(theirs, prompt, seed=5, **call)
        assert (bench.latents[name][0][:, :, 0] - latents).abs().max() <= 1e-4


def test_the_schedule_tells_turbo_from_base(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    turbo = theirs.scheduler.config.shift == 3.0
    defaults = ours.card.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == ((8, 0) if turbo else (50, 4))
