"""The diffusers fallback: the same pictures as diffusers, with progress, seeds and cancelling."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, RequestError, SetupError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.engine import pulse
from sgl_diffusion.engine.pipeline import WholePipeline
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.outbox import RecordingOutbox
from tests.recipes.tiny_sd import build_tiny_sd


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_sd")
    build_tiny_sd(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_sd: Path) -> WholePipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_sd)), lambda note: None)
    assert isinstance(opened, WholePipeline) and opened.card.backend == "diffusers"
    return opened


def no_partial(index: int, row: int, step: int, frames: torch.Tensor) -> None:
    raise AssertionError("nobody asked for it")


def wish(**more: object) -> SamplingParams:
    small = {"prompt": "a cat", "width": 48, "height": 32, "num_inference_steps": 3}
    return SamplingParams(**{**small, **more})  # type: ignore[arg-type]


def test_the_pictures_are_those_of_diffusers(pipeline: WholePipeline, tiny_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    params = pipeline.card.resolve(wish(seed=5, num_outputs=2), video=False)
    clips = pipeline.run(params, lambda step, total: None, no_partial)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_sd)(
        "a cat",
        width=48,
        height=32,
        num_inference_steps=3,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="np",
    ).images
    assert [clip.shape for clip in clips] == [(1, 32, 48, 3)] * 2
    for clip, image in zip(clips, theirs, strict=True):
        assert np.abs(clip[0].numpy() - image * 255).max() <= 1


def test_a_wan_checkpoint_through_diffusers_equals_our_own(tiny_wan_a: Path) -> None:
    clips = {}
    for backend in ("native", "diffusers"):
        options = EngineOptions(model_path=str(tiny_wan_a), backend=backend)
        worker = DiffusionWorker(
            lambda note, o=options: open_pipeline(o, note), options, outbox := RecordingOutbox()
        )
        worker.load()
        runner = worker._runner
        assert runner is not None
        card = open_pipeline(options, lambda note: None).card
        params = card.resolve(wish(num_frames=5, guidance_scale=4.0), video=True)
        worker.submit("job", {"params": dataclasses.asdict(params)})
        while worker.step():
            pass
        assert not outbox.errors
        clips[backend] = outbox.outputs["job"][0].numpy().astype(int)
    assert clips["native"].shape == (5, 32, 48, 3)
    assert np.abs(clips["native"] - clips["diffusers"]).max() <= 1


def test_progress_cancel_and_what_the_class_does_not_take(tiny_sd: Path) -> None:
    options = EngineOptions(model_path=str(tiny_sd))
    outbox = RecordingOutbox()
    worker = DiffusionWorker(lambda note: open_pipeline(options, note), options, outbox)
    worker.load()
    card = open_pipeline(options, lambda note: None).card
    params = dataclasses.asdict(card.resolve(wish(num_inference_steps=8), video=False))

    worker.submit("whole", {"params": params})
    assert worker.step() and not worker.step()
    # A slow step is told more than once.
    assert list(dict.fromkeys(step for _, step, _ in outbox.steps["whole"])) == list(range(9))

    def cancel_at_three() -> None:
        if outbox.steps["cut"][-1][1] == 3:
            worker.cancel("cut")

    outbox.on_poll = cancel_at_three
    worker.submit("cut", {"params": params})
    worker.step()
    assert outbox.steps["cut"][-1][1] == 3
    assert "cut" not in outbox.outputs and worker.running() == 0

    worker.submit("shifted", {"params": {**params, "flow_shift": 3.0}})
    worker.step()
    assert isinstance(outbox.errors["shifted"], RequestError)
    assert outbox.errors["shifted"].param == "flow_shift"


def test_a_long_call_looks_up_within_its_steps(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    options = EngineOptions(model_path=str(tiny_sd))
    outbox = RecordingOutbox()
    worker = DiffusionWorker(lambda note: open_pipeline(options, note), options, outbox)
    worker.load()
    card = open_pipeline(options, lambda note: None).card
    params = dataclasses.asdict(card.resolve(wish(num_inference_steps=2), video=False))
    worker.submit("whole", {"params": params})
    worker.step()
    steps = [step for _, step, _ in outbox.steps["whole"]]
    assert sorted(steps) == steps and all(steps.count(step) > 5 for step in (0, 1, 2))

    polls = 0

    def cancel_while_it_decodes() -> None:
        nonlocal polls
        polls += outbox.steps["cut"][-1][1] == 2
        if polls == 5:
            worker.cancel("cut")

    outbox.on_poll = cancel_while_it_decodes
    worker.submit("cut", {"params": params})
    worker.step()
    assert polls == 5 and "cut" not in outbox.outputs and worker.running() == 0


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("vae_precision", "fp16", "vae_precision cannot be chosen"),
        ("text_encoder_precision", "fp16", "text_encoder_precision cannot be chosen"),
        ("vae_tile_size", 64, "vae_tile_size cannot be chosen"),
        ("vae_cpu_offload", True, "--vae-cpu-offload: StableDiffusionPipeline runs through"),
        ("quantization", "int8", "--quantization: StableDiffusionPipeline runs through"),
    ],
)
def test_an_option_it_cannot_honour_is_refused(
    tiny_sd: Path, option: str, value: Any, text: str
) -> None:
    """Also where it is the model that has no recipe."""
    options = EngineOptions(model_path=str(tiny_sd), **{option: value})
    with pytest.raises(ConfigError, match=text):
        open_pipeline(options, lambda note: None)


def test_a_damaged_checkpoint_says_so(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd, tmp_path / "model")
    for file in (tmp_path / "model" / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(SetupError, match="unet holds no safetensors weights"):
        open_pipeline(EngineOptions(model_path=str(tmp_path / "model")), lambda note: None)


def test_a_class_that_is_no_pipeline_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(ConfigError, match="has no pipeline DDIMScheduler"):
        open_pipeline(EngineOptions(model_path=str(tmp_path)), lambda note: None)


def test_native_by_name_is_refused_where_no_recipe_is(tiny_sd: Path) -> None:
    options = EngineOptions(model_path=str(tiny_sd), backend="native")
    with pytest.raises(ConfigError, match="StableDiffusionPipeline cannot be served natively"):
        open_pipeline(options, lambda note: None)
