"""Served FLUX.1 models, through the whole engine, against diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes import flux
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench
from tests.oracles import images as oracle

PROMPT = "a red fox sleeping in the garden, oil painting"
NEGATIVE = "blurry, low quality"


def opened(path: Path) -> Pipeline:
    pipeline = open_pipeline(EngineOptions(model_path=str(path)), lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


@pytest.fixture(scope="module", params=["tiny_flux_a", "tiny_flux_b"])
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Any]:
    path: Path = request.getfixturevalue(request.param)
    return opened(path), oracle.pipeline(path)


def unpacked(latents: Tensor, height: int, width: int) -> Tensor:
    from diffusers import FluxPipeline

    result: Tensor = FluxPipeline._unpack_latents(latents, height, width, 8)
    return result[:, :, None]


def run(pipeline: Pipeline, **wish: Any) -> tuple[Tensor, Tensor]:
    bench = Bench(pipeline)
    bench.add("job", **{"num_frames": 1, **wish})
    bench.run()
    assert not bench.errors
    return bench.latents["job"][0], bench.outbox.outputs["job"][0][0]


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    height, width = theirs[1].shape[:2]
    latents = unpacked(theirs[0], height, width)
    assert 0.3 < latents.std() < 8, "the comparison means something for latents of order 1"
    assert (ours[0] - latents).abs().max() <= 1e-4
    assert (ours[1].int() - theirs[1].int()).abs().max() <= 1


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
    bench = Bench(ours)
    prompts = {"long": PROMPT, "short": "a car"}
    for name, prompt in prompts.items():
        bench.add(name, prompt=prompt, seed=5, num_frames=1, **call)
    bench.run()
    assert bench.count("denoise_forwards_total", rows="2") > 0
    for name, prompt in prompts.items():
        latents, _ = oracle.run(theirs, prompt, seed=5, guidance_scale=3.5, **call)
        assert (bench.latents[name][0] - unpacked(latents, 64, 48)).abs().max() <= 1e-4


def test_the_card_tells_which_model_it_is(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    card = ours.card
    assert (card.family, card.backend, card.edits) == ("flux", "native", "image-to-image")
    dev = theirs.transformer.config.guidance_embeds
    steps = (28, 3.5) if dev else (4, 0.0)
    assert (card.defaults.num_inference_steps, card.defaults.guidance_scale) == steps
    assert card.size_multiple == 16 and not card.makes_video


@pytest.fixture
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides bring pictures to smaller sizes, which is what takes the time."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as theirs

    sizes = [(width // 16 * 2, height // 16 * 2) for width, height in flux._TRAINED]
    sizes = [(w // 16 * 16, h // 16 * 16) for w, h in sizes]
    monkeypatch.setattr(theirs, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    monkeypatch.setattr(flux, "_TRAINED", sizes)


@pytest.mark.usefixtures("small_references")
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
