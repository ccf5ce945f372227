"""Served Z-Image models, through the whole engine, against diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.engine.pipeline import Pipeline
from tests.oracles import images as oracle
from tests.recipes.parity import NEGATIVE, PROMPT, assert_equal, opened, run, together, unpacked


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
    got = run(ours, prompt=PROMPT, seed=11, **call)
    assert_equal(got, oracle.run(theirs, PROMPT, seed=11, **call))


def test_prompts_of_different_length_share_a_batch(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    call = {"width": 48, "height": 64, "num_inference_steps": 3, "guidance_scale": 0.0}
    prompts = {"long": PROMPT, "short": "a car"}
    latents = together(ours, prompts, seed=5, **call)
    for name, prompt in prompts.items():
        expected, _ = oracle.run(theirs, prompt, seed=5, **call)
        assert (latents[name] - unpacked(expected, like=latents[name])).abs().max() <= 1e-4


def test_the_schedule_tells_turbo_from_base(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    turbo = theirs.scheduler.config.shift == 3.0
    defaults = ours.card.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == ((8, 0) if turbo else (50, 4))
