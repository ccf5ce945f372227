"""Denoising that begins with a picture, and pictures of which a part is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.engine.pictures import to_pixels
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench
from tests.engine.outbox import RecordingOutbox

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def picture(folder: Path) -> str:
    across, down = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    pixels = np.stack([across, down, 255 - across], -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "in.png")
    return str(folder / "in.png")


@pytest.fixture(scope="module")
def mask(folder: Path) -> str:
    """White in a part of the right half: 16 to 32 pixels down, 40 to 56 across."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[16:32, 40:56] = 255
    Image.fromarray(pixels).save(folder / "mask.png")
    return str(folder / "mask.png")


def frames_of(pipeline: Pipeline, **wish: object) -> list[np.ndarray]:
    bench = Bench(pipeline)
    bench.add("job", **{"width": WIDTH, "height": HEIGHT, "num_frames": 1, **wish})
    bench.run()
    assert not bench.errors, bench.errors
    return [np.asarray(clip[0]).astype(float) for clip in bench.outbox.outputs["job"]]


def latents_of(pipeline: Pipeline, **wish: object) -> torch.Tensor:
    bench = Bench(pipeline)
    bench.add("job", **{"width": WIDTH, "height": HEIGHT, "num_frames": 1, **wish})
    bench.run()
    return bench.latents["job"][0]


def round_trip(pipeline: Pipeline, picture: str) -> np.ndarray:
    with Image.open(picture) as opened:
        latents = pipeline.encode_images(to_pixels(opened, WIDTH, HEIGHT))
    return np.asarray(next(pipeline.decode(latents))[0]).astype(float)


def test_no_strength_gives_the_picture_back(pipeline: Pipeline, picture: str) -> None:
    (frame,) = frames_of(pipeline, images=(picture,), strength=0.0)
    assert np.array_equal(frame, round_trip(pipeline, picture))


def test_the_way_from_the_picture_grows_with_strength(pipeline: Pipeline, picture: str) -> None:
    origin = round_trip(pipeline, picture)
    away = []
    for strength in (0.0, 0.13, 0.4, 1.0):
        (frame,) = frames_of(pipeline, images=(picture,), strength=strength, num_inference_steps=8)
        away.append(float(np.abs(frame - origin).mean()))
    assert away == sorted(away) and away[0] == 0.0 and away[1] > 0.1


def test_full_strength_is_text_to_image(pipeline: Pipeline, picture: str) -> None:
    begun = latents_of(pipeline, images=(picture,), strength=1.0)
    assert torch.equal(begun, latents_of(pipeline))


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.75, 0.99])
def test_the_steps_equal_those_of_diffusers_scheduler(
    pipeline: Pipeline, picture: str, strength: float
) -> None:
    """The same network under the loop that diffusers' image-to-image pipelines have."""
    from diffusers import UniPCMultistepScheduler

    steps = 9
    ours = latents_of(
        pipeline, images=(picture,), strength=strength, num_inference_steps=steps, seed=5
    )
    params = pipeline.card.resolve(
        SamplingParams(prompt="a cat", width=WIDTH, height=HEIGHT, seed=5), video=False
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    start = int(max(steps - min(steps * strength, steps), 0))
    scheduler.set_begin_index(start)
    sigma = scheduler.sigmas[start]
    with Image.open(picture) as opened:
        clean = pipeline.encode_images(to_pixels(opened, WIDTH, HEIGHT))
    x = (
        sigma * pipeline.noise(params, 5) + (1 - sigma) * clean
        if start
        else pipeline.noise(params, 5)
    )
    conditions = [pipeline.encode(text, params, ()) for text in ("a cat", "")]
    with torch.inference_mode():
        for t in scheduler.timesteps[start:]:
            now = torch.tensor([float(t)])
            given, empty = (
                pipeline.velocity(x, now, pipeline.collate([condition]), 0)
                for condition in conditions
            )
            x = scheduler.step(empty + 5.0 * (given - empty), t, x, return_dict=False)[0]
    assert (ours - x).abs().max() <= 2e-4 * x.abs().max()


def test_it_shares_batches_with_other_jobs(pipeline: Pipeline, picture: str, mask: str) -> None:
    wishes = {
        "text": {"num_inference_steps": 5},
        "picture": {"images": (picture,), "strength": 0.5},
        "masked": {"images": (picture,), "mask": mask, "seed": 7},
        "clean": {"images": (picture,), "strength": 0.0},
    }
    alone = {name: latents_of(pipeline, **wish) for name, wish in wishes.items()}
    bench = Bench(pipeline)
    for name, wish in wishes.items():
        bench.add(name, **{"width": WIDTH, "height": HEIGHT, "num_frames": 1, **wish})
    bench.run()
    for name, latents in alone.items():
        assert (bench.latents[name][0] - latents).abs().max() <= 1e-5 * latents.abs().max(), name
    assert bench.count("denoise_forwards_total", rows="3") > 0
    assert bench.outbox.steps["picture"][-1][1:] == (3, 3), "six steps, half of them run"


def test_outside_the_mask_every_pixel_stays(pipeline: Pipeline, picture: str, mask: str) -> None:
    (frame,) = frames_of(pipeline, images=(picture,), mask=mask)
    with Image.open(picture) as opened:
        given = np.asarray(opened).astype(float)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[16:32, 40:56] = True
    assert np.array_equal(frame[~inside], given[~inside])
    assert np.abs(frame[inside] - given[inside]).mean() > 10


def test_the_network_sees_the_picture_around_the_mask(
    pipeline: Pipeline, picture: str, mask: str
) -> None:
    """The latents outside the mask are the picture's, those inside depend on them."""
    with Image.open(picture) as opened:
        clean = pipeline.encode_images(to_pixels(opened, WIDTH, HEIGHT))
    masked = latents_of(pipeline, images=(picture,), mask=mask)
    inside = torch.zeros(HEIGHT // 8, WIDTH // 8, dtype=torch.bool)
    inside[2:4, 5:7] = True
    assert torch.allclose(masked[..., ~inside], clean[..., ~inside], atol=1e-6)
    free = latents_of(pipeline)
    assert (masked[..., inside] - free[..., inside]).abs().max() > 0.01


def test_each_output_has_noise_of_its_own(pipeline: Pipeline, picture: str, mask: str) -> None:
    one, two = frames_of(pipeline, images=(picture,), mask=mask, num_outputs=2, seed=3)
    (second,) = frames_of(pipeline, images=(picture,), mask=mask, seed=4)
    assert not np.array_equal(one, two)
    assert np.abs(two - second).max() <= 1


def test_a_picture_of_another_size_is_stretched(pipeline: Pipeline, folder: Path) -> None:
    Image.new("RGB", (100, 30), (200, 30, 90)).save(folder / "wide.png")
    Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 90)).save(folder / "flat.png")
    first, second = (
        frames_of(pipeline, images=(str(folder / name),), strength=0.0)[0]
        for name in ("wide.png", "flat.png")
    )
    assert np.abs(first - second).max() <= 4


def test_a_wrong_mask_fails_its_job_only(pipeline: Pipeline, picture: str, folder: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "black.png")
    Image.new("L", (16, 16), 255).save(folder / "small.png")
    (folder / "text.png").write_text("no picture")
    bench = Bench(pipeline)
    masks = {"black": "black.png", "small": "small.png", "text": "text.png", "none": "none.png"}
    for name, file in masks.items():
        bench.add(name, num_frames=1, images=(picture,), mask=str(folder / file))
    bench.add("good", num_frames=1)
    bench.run()
    assert list(bench.outbox.outputs) == ["good"]
    codes = {name: error.code for name, error in bench.errors.items()}  # type: ignore[attr-defined]
    assert codes == {
        "black": "invalid_mask",
        "small": "invalid_mask",
        "text": "invalid_image",
        "none": "file_not_found",
    }
    assert str(folder) not in str(bench.errors["none"])


@pytest.mark.parametrize(
    ("wish", "code", "param"),
    [
        ({"images": ("a", "b")}, "too_many_images", "images"),
        ({"strength": 0.5}, "conflicting_parameters", "strength"),
        ({"mask": "m"}, "conflicting_parameters", "mask"),
        ({"images": ("a",), "strength": 1.5}, "out_of_range", "strength"),
        ({"images": ("a",), "strength": float("nan")}, "not_finite", "strength"),
        ({"images": ("a",), "num_frames": 5}, "unsupported_parameter", "images"),
        ({"true_cfg_scale": 2.0}, "unsupported_parameter", "true_cfg_scale"),
        ({"guidance_scale_2": 2.0}, "unsupported_parameter", "guidance_scale_2"),
        ({"partial_images": 4}, "out_of_range", "partial_images"),
    ],
)
def test_what_makes_no_sense_is_refused(
    pipeline: Pipeline, wish: dict, code: str, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        pipeline.card.resolve(
            SamplingParams(prompt="a", **wish), video=wish.get("num_frames", 1) > 1
        )
    assert (caught.value.code, caught.value.param) == (code, param)


class ReadsPictures:
    """The pipeline as if it read pictures itself: it writes down what it is given."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.card = dataclasses.replace(pipeline.card, edits="native", max_images=2)
        self.given: list[tuple[str, list[Image.Image]]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._pipeline, name)

    def encode(self, prompt: str, params: object, pictures: list[Image.Image]) -> object:
        self.given.append((prompt, list(pictures)))
        return self._pipeline.encode(prompt, params, ())  # type: ignore[arg-type]


def test_a_model_that_reads_pictures_gets_them_as_they_are(
    pipeline: Pipeline, picture: str, folder: Path
) -> None:
    other = folder / "other.png"
    Image.new("RGBA", (30, 200), (255, 0, 0, 0)).save(other)
    reader = ReadsPictures(pipeline)
    latents = latents_of(reader, images=(picture, str(other)), negative_prompt="no")  # type: ignore[arg-type]
    assert [prompt for prompt, _ in reader.given] == ["a cat", "no"], "with and without the prompt"
    for _, pictures in reader.given:
        assert [(image.mode, image.size) for image in pictures] == [
            ("RGB", (WIDTH, HEIGHT)),
            ("RGB", (30, 200)),
        ]
        assert pictures[1].getpixel((0, 0)) == (255, 255, 255), "on white where it is transparent"
    assert torch.equal(latents, latents_of(pipeline, negative_prompt="no")), "all steps are run"


def test_a_mask_keeps_pixels_on_a_model_that_reads_pictures(
    pipeline: Pipeline, picture: str, mask: str
) -> None:
    reader = ReadsPictures(pipeline)
    (frame,) = frames_of(reader, images=(picture,), mask=mask)  # type: ignore[arg-type]
    with Image.open(picture) as opened:
        given = np.asarray(opened).astype(float)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[16:32, 40:56] = True
    assert np.array_equal(frame[~inside], given[~inside])
    assert len(reader.given) == 2 and len(reader.given[0][1]) == 1


def test_a_model_that_needs_a_picture_warms_up_with_one(pipeline: Pipeline) -> None:
    reader = ReadsPictures(pipeline)
    reader.card = dataclasses.replace(reader.card, min_images=2, lora_targets=())
    worker = DiffusionWorker(lambda note: reader, EngineOptions(), RecordingOutbox())  # type: ignore[arg-type,return-value]
    worker.load()
    assert reader.given and len(reader.given[-1][1]) == 2
