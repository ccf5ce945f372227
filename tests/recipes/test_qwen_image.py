"""Served Qwen-Image models, through the whole engine, against diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.engine.pipeline import Pipeline
from tests.checkpoints.tiny_qwen_image import build
from tests.oracles import images as oracle
from tests.oracles.qwen_processor import Processor
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


@pytest.fixture(scope="module", params=["tiny_qwen_image_a", "tiny_qwen_image_b"])
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Any]:
    path: Path = request.getfixturevalue(request.param)
    return opened(path), oracle.pipeline(path)


@pytest.mark.parametrize("true_cfg", [1.0, 4.0])
@pytest.mark.parametrize(("width", "height"), [(80, 48), (64, 64)])
def test_latents_and_pixels_equal_diffusers(
    both: tuple[Pipeline, Any], true_cfg: float, width: int, height: int
) -> None:
    """Prompt and negative prompt have different lengths, and share the batch."""
    ours, theirs = both
    call = {
        "width": width,
        "height": height,
        "num_inference_steps": 4,
        "true_cfg_scale": true_cfg,
        "negative_prompt": NEGATIVE,
    }
    got = run(ours, prompt=PROMPT, seed=11, **call)
    assert_equal(got, oracle.run(theirs, PROMPT, seed=11, **call))


def test_prompts_of_different_length_share_a_batch(both: tuple[Pipeline, Any]) -> None:
    ours, theirs = both
    call = {"width": 48, "height": 64, "num_inference_steps": 3, "true_cfg_scale": 2.0}
    prompts = {"long": PROMPT, "short": "a car"}
    latents = together(ours, prompts, seed=5, **call)
    for name, prompt in prompts.items():
        expected, _ = oracle.run(theirs, prompt, seed=5, negative_prompt=" ", **call)
        assert (latents[name] - unpacked(expected, like=latents[name])).abs().max() <= 1e-4


@pytest.fixture(scope="module", params=["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def editing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pipeline, Any]:
    folder = tmp_path_factory.mktemp("models") / request.param
    plus = "Plus" in request.param
    build(folder, kind=request.param, zero_cond_t=plus, seed=2)
    theirs = oracle.pipeline(folder, processor=None)
    theirs.processor = Processor(folder)
    return opened(folder), theirs


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_references(monkeypatch)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("count", "true_cfg"), [(1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0)])
def test_edits_equal_diffusers(
    editing: tuple[Pipeline, Any], tmp_path: Path, count: int, true_cfg: float
) -> None:
    compare_edits(*editing, tmp_path, count, true_cfg)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_edits_of_full_size_equal_diffusers(
    editing: tuple[Pipeline, Any], tmp_path: Path, count: int
) -> None:
    compare_edits(*editing, tmp_path, count, 1.0)


def compare_edits(ours: Pipeline, theirs: Any, tmp_path: Path, count: int, true_cfg: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, files = [], []
    for number, size in enumerate([(192, 128), (96, 160)][:count]):
        small = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        pictures.append(Image.fromarray(small.numpy()).resize(size))
        files.append(str(tmp_path / f"{number}.png"))
        pictures[-1].save(files[-1])
    call = {
        "width": 96,
        "height": 64,
        "num_inference_steps": 2,
        "true_cfg_scale": true_cfg,
        "negative_prompt": NEGATIVE,
    }
    if count > ours.card.max_images:
        with pytest.raises(RequestError, match="takes at most 1"):
            run(ours, prompt=PROMPT, images=tuple(files), **call)
        return
    got = run(ours, prompt=PROMPT, seed=3, images=tuple(files), **call)
    image = pictures if count > 1 else pictures[0]
    assert_equal(got, oracle.run(theirs, PROMPT, seed=3, image=image, **call))


def test_an_edit_without_a_picture_is_refused(editing: tuple[Pipeline, Any]) -> None:
    with pytest.raises(RequestError, match="works on a picture"):
        run(editing[0], prompt=PROMPT, width=64, height=64)
