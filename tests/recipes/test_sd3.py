"""Served Stable Diffusion 3 models, through the whole engine, against diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.engine.pipeline import Pipeline
from tests.oracles import images as oracle
from tests.recipes.parity import NEGATIVE, PROMPT, assert_equal, opened, run, together, unpacked

_T5 = ("text_encoder_3", "tokenizer_3")


@pytest.fixture(scope="module", params=["tiny_sd3_a", "tiny_sd3_b"])
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Any]:
    path: Path = request.getfixturevalue(request.param)
    ours = opened(path)
    # What a repository declares absent has to be told to diffusers again.
    absent = {} if (path / "text_encoder_3").exists() else dict.fromkeys(_T5)
    return ours, oracle.pipeline(path, **absent)


@pytest.mark.parametrize("guidance", [7.0, 1.0])
@pytest.mark.parametrize(("width", "height"), [(80, 48), (64, 64)])
def test_latents_and_pixels_equal_diffusers(
    both: tuple[Pipeline, Any], guidance: float, width: int, height: int
) -> None:
    ours, theirs = both
    call = {
        "width": width,
        "height": height,
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "negative_prompt": NEGATIVE,
        "max_sequence_length": 64,
    }
    got = run(ours, prompt=PROMPT, seed=11, **call)
    assert_equal(got, oracle.run(theirs, PROMPT, seed=11, **call))


def test_two_prompts_of_different_length_share_a_batch(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    call = {"width": 48, "height": 64, "num_inference_steps": 3, "max_sequence_length": 64}
    prompts = {"long": PROMPT, "short": "a car"}
    latents = together(ours, prompts, seed=5, **call)
    for name, prompt in prompts.items():
        expected, _ = oracle.run(theirs, prompt, seed=5, guidance_scale=7.0, **call)
        assert (latents[name] - unpacked(expected, like=latents[name])).abs().max() <= 1e-4


def test_a_model_with_a_small_table_of_positions_has_a_default_that_fits(
    both: tuple[Pipeline, Any],
) -> None:
    card = both[0].card
    assert card.defaults.width == card.defaults.height == card.max_edge < 1024
    assert card.resolve(SamplingParams(prompt=PROMPT), video=False).width == card.max_edge


def test_a_picture_larger_than_the_table_of_positions_is_refused(
    both: tuple[Pipeline, Any],
) -> None:
    with pytest.raises(RequestError, match="from 16 to 192"):
        run(both[0], width=208, height=64)
