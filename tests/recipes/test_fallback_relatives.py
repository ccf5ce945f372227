"""Relatives of our families that have no recipe: through diffusers with its own results, or refused
before anything is loaded."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, RequestError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.engine.pipeline import WholePipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.checkpoints.tiny_wan import Build

WIDTH, HEIGHT = 96, 64
CALL: dict[str, Any] = {
    "prompt": "a red fox",
    "width": WIDTH,
    "height": HEIGHT,
    "num_inference_steps": 2,
    "max_sequence_length": 64,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        small = torch.randint(0, 256, (8, 12, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(small.numpy()).resize((WIDTH, HEIGHT)).save(folder / f"{name}.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:48, 32:80] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return {name: str(folder / f"{name}.png") for name in ("one", "two", "mask")}


def opened(path: Path, **more: Any) -> WholePipeline:
    served = open_pipeline(EngineOptions(model_path=str(path), **more), lambda note: None)
    assert isinstance(served, WholePipeline)
    return served


def ours(pipeline: WholePipeline, video: bool = False, **wish: Any) -> np.ndarray:
    params = pipeline.card.resolve(SamplingParams(**{**CALL, "seed": 7, **wish}), video=video)
    (clip,) = pipeline.run(params, lambda step, total: None, lambda *shown: None)
    return clip.numpy().astype(float)


def theirs(path: Path, **call: Any) -> np.ndarray:
    from diffusers import DiffusionPipeline

    absent = json.loads((path / "model_index.json").read_text())
    absent = {name: None for name, value in absent.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(path, **absent)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    result = pipe(**{**CALL, "generator": generator, "output_type": "np", **call})
    clip = result.frames[0] if hasattr(result, "frames") else result.images
    return np.asarray(clip) * 255


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["tiny_flux_control", "tiny_flux_controlnet"])
def test_a_control_picture(
    name: str, files: dict[str, str], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    pipeline = opened(path)
    card = pipeline.card
    assert (card.edits, card.min_images, card.max_images, card.tasks) == (
        "native", 1, 1, ("TI2I",)
    )  # fmt: skip
    with Image.open(files["one"]) as control, Image.open(files["two"]) as other:
        got = ours(pipeline, images=(files["one"],))
        assert np.abs(got - theirs(path, control_image=control)).max() <= 1.01
        assert np.abs(got - theirs(path, control_image=other)).mean() > 0.05
    with pytest.raises(RequestError, match="works on a picture"):
        ours(pipeline)


def test_a_masked_part_is_filled(tiny_flux_fill: Path, files: dict[str, str]) -> None:
    pipeline = opened(tiny_flux_fill)
    assert pipeline.card.needs_mask and pipeline.card.masks and pipeline.card.min_images == 1
    got = ours(pipeline, images=(files["one"],), mask=files["mask"])[0]
    with Image.open(files["one"]) as given, Image.open(files["mask"]) as mask:
        inside = np.asarray(mask) > 0
        filled = theirs(tiny_flux_fill, image=given, mask_image=mask)[0]
        assert np.abs(got - filled)[inside].max() <= 1.01
        assert np.array_equal(got[~inside], np.asarray(given).astype(float)[~inside])
    with pytest.raises(RequestError, match="no mask was given") as caught:
        ours(pipeline, images=(files["one"],))
    assert (caught.value.code, caught.value.param) == ("mask_required", "mask")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_klein_with_kept_references(
    tiny_flux2_klein: Path, tmp_path: Path, files: dict[str, str], count: int
) -> None:
    copy = Path(shutil.copytree(tiny_flux2_klein, tmp_path / "model"))
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "Flux2KleinKVPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    given = [files["one"], files["two"]][:count]
    got = ours(opened(copy), images=tuple(given))
    shown = [Image.open(file) for file in given]
    expected = theirs(copy, **({"image": shown} if shown else {}))
    assert np.abs(got - expected).max() <= 1.01


CLIP = {"width": 32, "height": 32, "num_frames": 5}


@pytest.mark.parametrize("count", [0, 2])
def test_wan_vace(tiny_wan_kind: Build, files: dict[str, str], count: int) -> None:
    path = tiny_wan_kind("vace")
    pipeline = opened(path)
    assert pipeline.card.tasks == ("T2I", "T2V", "TI2V") and pipeline.card.max_images == 4
    given = [files["one"], files["two"]][:count]
    got = ours(pipeline, video=True, images=tuple(given), **CLIP)
    shown = [Image.open(file) for file in given]
    expected = theirs(path, reference_images=shown or None, **CLIP)
    assert got.shape == (5, 32, 32, 3)
    assert np.abs(got - expected).max() <= 1.01


def test_wan_vace_makes_several_clips_one_by_one(tiny_wan_kind: Build) -> None:
    """Its class takes no seed for each of several."""
    pipeline = opened(tiny_wan_kind("vace"))
    wish = SamplingParams(**{**CALL, **CLIP, "num_outputs": 2, "seed": 6})
    params = pipeline.card.resolve(wish, video=True)
    steps: list[tuple[int, int]] = []
    clips = pipeline.run(params, lambda *step: steps.append(step), lambda *shown: None)
    assert steps == sorted(steps) and steps[-1] == (4, 4)
    assert torch.equal(clips[1].double(), torch.from_numpy(ours(pipeline, True, **CLIP)))


REFUSED = {
    "FluxControlImg2ImgPipeline": "a control picture beside the one it edits",
    "FluxPriorReduxPipeline": "does not make pictures of a prompt",
    "QwenImageControlNetInpaintPipeline": "a control picture beside the one it edits",
    "QwenImageLayeredPipeline": "layers of a picture",
    "StableAudioPipeline": "makes no pictures",
    "WanAnimatePipeline": "it needs pose_video, face_video",
    "WanVideoToVideoPipeline": "starts from a video",
    "ZImageControlNetInpaintPipeline": "a mask in a way of its own",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_request_can_ask_for_is_refused_before_it_is_loaded(
    name: str, tmp_path: Path
) -> None:
    import diffusers

    assert inspect.isclass(getattr(diffusers, name))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ConfigError, match=f"{name} cannot be served: .*{REFUSED[name]}"):
        opened(tmp_path)
