"""Pictures through the diffusers fallback: the same results as diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.engine.pipeline import WholePipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.recipes.tiny_sd import build_tiny_sd

SIZE = (48, 32)


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_sd")
    build_tiny_sd(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_sd: Path) -> WholePipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_sd)), lambda note: None)
    assert isinstance(opened, WholePipeline)
    return opened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    across, down = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    picture = np.stack([across, down, 255 - across], -1).astype(np.uint8)
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[8:24, 16:40] = 255
    Image.fromarray(picture).save(folder / "in.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return {name: str(folder / f"{name}.png") for name in ("in", "mask")}


Shown = list[tuple[int, int, int, np.ndarray]]


def run(
    pipeline: WholePipeline, **more: Any
) -> tuple[list[np.ndarray], list[tuple[int, int]], Shown]:
    """The frames, the progress and the partial pictures of a job."""
    small = {"prompt": "a cat", "width": SIZE[0], "height": SIZE[1], "num_inference_steps": 4}
    params = pipeline.card.resolve(SamplingParams(**{**small, **more}), video=False)
    steps: list[tuple[int, int]] = []
    shown: Shown = []
    clips = pipeline.run(
        params,
        lambda step, total: steps.append((step, total)),
        lambda index, row, step, frames: shown.append((index, row, step, frames[0].numpy())),
    )
    return [clip[0].numpy().astype(float) for clip in clips], steps, shown


def opened(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(float)


def test_image_to_image_is_that_of_diffusers(
    pipeline: WholePipeline, tiny_sd: Path, files: dict[str, str]
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    card = pipeline.card
    assert (card.edits, card.max_images, card.masks) == ("image-to-image", 1, True)
    assert card.defaults.strength == 0.8 and "TI2I" in card.tasks
    frames, steps, _ = run(pipeline, images=(files["in"],), strength=0.5, seed=5, num_outputs=2)
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_sd)
    with Image.open(files["in"]) as picture:
        for frame, seed in zip(frames, (5, 6), strict=True):
            image = theirs(
                "a cat",
                image=picture.convert("RGB"),
                strength=0.5,
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images[0]
            assert np.abs(frame - image * 255).max() <= 1
    assert steps[0] == (0, 4) and steps[-1] == (4, 4) and steps == sorted(steps)


def test_no_strength_gives_the_picture_back(pipeline: WholePipeline, files: dict[str, str]) -> None:
    (frame,), steps, _ = run(pipeline, images=(files["in"],), strength=0.0)
    assert np.array_equal(frame, opened(files["in"]))
    assert all(step <= total for step, total in steps)


def test_outside_the_mask_every_pixel_stays(pipeline: WholePipeline, files: dict[str, str]) -> None:
    (frame,), _, _ = run(pipeline, images=(files["in"],), mask=files["mask"])
    given, inside = opened(files["in"]), opened(files["mask"]) > 0
    assert np.array_equal(frame[~inside], given[~inside])
    assert np.abs(frame[inside] - given[inside]).mean() > 5


def scheduler_named(name: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        import diffusers

        return getattr(diffusers, name)(**more)

    return make


SCHEDULERS = {
    "ddim": scheduler_named("DDIMScheduler", clip_sample=False, steps_offset=1),
    "v": scheduler_named("DDIMScheduler", clip_sample=False, prediction_type="v_prediction"),
    "euler": scheduler_named("EulerDiscreteScheduler"),
    "dpm": scheduler_named("DPMSolverMultistepScheduler"),
    "unipc": scheduler_named("UniPCMultistepScheduler"),
    "flow": scheduler_named("FlowMatchEulerDiscreteScheduler"),
}


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_clean_latents_of_a_step_are_those_of_the_scheduler(name: str) -> None:
    """Against the scheduler's own: one more step from here to no noise at all ends there."""
    from types import SimpleNamespace

    from sgl_diffusion.recipes.fallback_previews import can_preview, watched

    scheduler = SCHEDULERS[name]()
    vae = type("AutoencoderKL", (), {})()
    pipe = SimpleNamespace(scheduler=scheduler, vae=vae)
    assert can_preview(pipe)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(1, 4, 4, 4, generator=generator)
    noise = torch.randn(1, 4, 4, 4, generator=generator)
    with watched(pipe) as foreseen:
        assert foreseen() is None
        for t in scheduler.timesteps[:3]:
            # What a perfect model says of this mixture of `clean` and `noise`.
            if name == "flow":
                sigma = scheduler.sigmas[(scheduler.timesteps == t).nonzero()[0]]
                sample, said = (1 - sigma) * clean + sigma * noise, noise - clean
            elif name == "euler":
                sigma = scheduler.sigmas[(scheduler.timesteps == t).nonzero()[0]]
                sample, said = clean + sigma * noise, noise
            else:
                share = scheduler.alphas_cumprod[int(t)]
                sample = share.sqrt() * clean + (1 - share).sqrt() * noise
                said = noise if name != "v" else share.sqrt() * noise - (1 - share).sqrt() * clean
            if name == "euler":
                scheduler.is_scale_input_called = True
            scheduler.step(said, t, sample, return_dict=False)
            found = foreseen()
            assert found is not None and (found - clean).abs().max() < 2e-2
    assert scheduler.step.__self__ is scheduler, "the watch is over"


def test_partial_pictures(pipeline: WholePipeline, files: dict[str, str]) -> None:
    assert pipeline.card.previews
    finals, _, shown = run(pipeline, partial_images=3, num_outputs=2, num_inference_steps=8)
    assert [(index, row, step) for index, row, step, _ in shown] == [
        (index, row, 2 * index + 2) for index in range(3) for row in range(2)
    ]
    for row, final in enumerate(finals):
        away = [
            float(np.square(frame - final).mean()) for _, which, _, frame in shown if which == row
        ]
        assert away == sorted(away, reverse=True)
    plain, _, nothing = run(pipeline, num_outputs=2, num_inference_steps=8)
    assert not nothing and all(np.array_equal(a, b) for a, b in zip(plain, finals, strict=True))
    _, _, edited = run(pipeline, images=(files["in"],), partial_images=1, num_outputs=2)
    assert [(index, row) for index, row, _, _ in edited] == [(0, 0), (0, 1)]


def test_a_wan_checkpoint_shows_what_our_own_shows(tiny_wan_a: Path) -> None:
    options = EngineOptions(model_path=str(tiny_wan_a), backend="diffusers")
    pipeline = open_pipeline(options, lambda note: None)
    assert isinstance(pipeline, WholePipeline)
    card = pipeline.card
    assert card.previews and (card.edits, card.max_images) == ("none", 0)
    _, _, shown = run(pipeline, partial_images=2, seed=3, num_inference_steps=6)
    from tests.engine.bench import Bench

    own = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    bench = Bench(own)  # type: ignore[arg-type]
    bench.add("job", num_frames=1, partial_images=2, seed=3, guidance_scale=5.0)
    bench.run()
    ours = [np.asarray(arrays[0])[0] for _, arrays in bench.outbox.parts["job"]]
    assert [step for _, _, step, _ in shown] == [2, 4]
    for (_, _, _, theirs), mine in zip(shown, ours, strict=True):
        assert np.abs(theirs.astype(float) - mine).max() <= 2


def test_a_class_that_needs_a_picture_is_served(tiny_sd: Path, tmp_path: Path) -> None:
    """Named in model_index.json, as repositories of edit models do."""
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    opened = open_pipeline(EngineOptions(model_path=str(folder)), lambda note: None)
    card = opened.card
    assert (card.edits, card.min_images, card.tasks) == ("image-to-image", 1, ("TI2I",))
    assert not card.masks
