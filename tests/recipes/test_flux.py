"""Served FLUX.1 models, through the whole engine, against diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.engine.pipeline import Pipeline
from tests.oracles import images as oracle
from tests.recipes.parity import (
    NEGATIVE,
    PROMPT,
    assert_equal,
    opened,
    run,
    small_references,
    together,
    unpacked,
)


@pytest.fixture(scope="module", params=["tiny_flux_a", "tiny_flux_b"])
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Any]:
    path: Path = request.getfixturevalue(request.param)
    return opened(path), oracle.pipeline(path)


@pytest.mark.parametrize("guidance", [3.5, 1.0])
@pytest.mark.parametrize("true_cfg", [1.0, 4.0])
@pytest.mark.parametrize(("width", "height"), [(80, 48), (64, 64)])
def test_latents_and_pixels_equal_diffusers(
    both: tuple[Pipeline, Any], guidance: float, true_cfg: float, width: int, height: int
) -> None:
    ours, theirs = both
    call = {
        "width": width,
        "height": height,
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "true_cfg_scale": true_cfg,
        "negative_prompt": NEGATIVE,
        "max_sequence_length": 64,
    }
    ops.reset_counts()
    got = run(ours, prompt=PROMPT, seed=11, **call)
    assert {"qk_norm_rope", "gate_residual_norm_modulate"} <= {op for op, _ in ops.counts()}
    assert_equal(got, oracle.run(theirs, PROMPT, seed=11, **call))


def test_two_prompts_of_different_length_share_a_batch(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    call = {"width": 48, "height": 64, "num_inference_steps": 3, "max_sequence_length": 64}
    prompts = {"long": PROMPT, "short": "a car"}
    latents = together(ours, prompts, seed=5, **call)
    for name, prompt in prompts.items():
        expected, _ = oracle.run(theirs, prompt, seed=5, guidance_scale=3.5, **call)
        assert (latents[name] - unpacked(expected, like=latents[name])).abs().max() <= 1e-4


def test_the_card_tells_which_model_it_is(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    card = ours.card
    assert (card.family, card.backend, card.edits) == ("flux", "native", "image-to-image")
    dev = theirs.transformer.config.guidance_embeds
    steps = (28, 3.5) if dev else (4, 0.0)
    assert (card.defaults.num_inference_steps, card.defaults.guidance_scale) == steps
    assert card.size_multiple == 16 and not card.makes_video


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_references(monkeypatch)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [(192, 128), (128, 160)])
@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_kontext_edits_equal_diffusers(
    tiny_kontext: Path, tmp_path: Path, size: tuple[int, int], true_cfg: float
) -> None:
    compare_edits(tiny_kontext, tmp_path, size, true_cfg)


@pytest.mark.slow
def test_kontext_edits_of_full_size_equal_diffusers(tiny_kontext: Path, tmp_path: Path) -> None:
    compare_edits(tiny_kontext, tmp_path, (192, 128), 1.0)


def compare_edits(
    tiny_kontext: Path, tmp_path: Path, size: tuple[int, int], true_cfg: float
) -> None:
    from PIL import Image

    pixels = torch.randint(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy()).resize(size)
    picture.save(tmp_path / "in.png")
    call = {
        "width": 96,
        "height": 64,
        "num_inference_steps": 2,
        "true_cfg_scale": true_cfg,
        "negative_prompt": NEGATIVE,
        "max_sequence_length": 32,
    }
    got = run(
        opened(tiny_kontext), prompt=PROMPT, seed=3, images=(str(tmp_path / "in.png"),), **call
    )
    theirs = oracle.run(
        oracle.pipeline(tiny_kontext), PROMPT, seed=3, image=picture, max_area=96 * 64, **call
    )
    assert_equal(got, theirs)
