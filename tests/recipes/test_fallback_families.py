"""Families without a native recipe through the whole engine: what comes out is diffusers' own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.outbox import RecordingOutbox

# The schedulers of these families hand tensors to numpy in a way that it wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


@dataclass(frozen=True)
class Case:
    width: int
    height: int
    frames: int = 1
    guidance: float = 5.0


CASES = {
    "tiny_sdxl": Case(48, 32),
    "tiny_sana": Case(96, 64),
    "tiny_ltx": Case(96, 64, frames=9, guidance=3.0),
}


class Engine:
    """A worker with a fallback pipeline, and the pipeline of diffusers on the same files."""

    def __init__(self, path: Path, case: Case) -> None:
        from diffusers import DiffusionPipeline

        self.case = case
        options = EngineOptions(model_path=str(path))
        self.outbox = RecordingOutbox()
        self.worker = DiffusionWorker(
            lambda note: open_pipeline(options, note), options, self.outbox
        )
        card = dict(self.worker.load())
        del card["loras"]
        self.card = open_pipeline(options, lambda note: None).card
        assert (
            self.card.backend == "diffusers" and card["pipeline_class"] == self.card.pipeline_class
        )
        self.theirs: Any = DiffusionPipeline.from_pretrained(path)
        self.theirs.set_progress_bar_config(disable=True)

    def submit(self, name: str, **more: Any) -> None:
        case = self.case
        wish = {
            "prompt": "a red fox",
            "width": case.width,
            "height": case.height,
            "num_frames": case.frames,
            "num_inference_steps": 3,
            "guidance_scale": case.guidance,
        }
        video = case.frames > 1
        params = self.card.resolve(SamplingParams(**{**wish, **more}), video=video)
        self.worker.submit(name, {"params": dataclasses.asdict(params)})

    def run(self, name: str, **more: Any) -> list[np.ndarray]:
        self.submit(name, **more)
        while self.worker.step():
            pass
        assert name not in self.outbox.errors, self.outbox.errors
        return [np.asarray(clip).astype(float) for clip in self.outbox.outputs[name]]

    def expected(self, seed: int, **more: Any) -> np.ndarray:
        case = self.case
        call = {
            "prompt": "a red fox",
            "width": case.width,
            "height": case.height,
            "num_inference_steps": 3,
            "guidance_scale": case.guidance,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "np",
        }
        call |= {"num_frames": case.frames} if case.frames > 1 else {}
        result = self.theirs(**{**call, **more})
        clip = result.frames[0] if case.frames > 1 else result.images
        return np.asarray(clip) * 255


@pytest.fixture(scope="module", params=CASES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.getfixturevalue(request.param), CASES[request.param])


def test_seeds_and_negative_prompts_are_those_of_diffusers(engine: Engine) -> None:
    case = engine.case
    clips = engine.run("two", seed=5, num_outputs=2)
    assert [clip.shape for clip in clips] == [(case.frames, case.height, case.width, 3)] * 2
    for clip, seed in zip(clips, (5, 6), strict=True):
        assert np.abs(clip - engine.expected(seed)).max() <= 1.01
    assert np.abs(clips[0] - clips[1]).mean() > 1
    (away,) = engine.run("away", seed=5, negative_prompt="blurry")
    assert np.abs(away - engine.expected(5, negative_prompt="blurry")).max() <= 1.01
    assert np.abs(away - clips[0]).mean() > 0.01


def test_progress_and_cancel(engine: Engine) -> None:
    engine.run("whole", num_inference_steps=5)
    assert sorted({step for _, step, _ in engine.outbox.steps["whole"]}) == list(range(6))

    def cancel_at_two() -> None:
        if engine.outbox.steps["cut"][-1][1] == 2:
            engine.worker.cancel("cut")

    engine.submit("cut", num_inference_steps=5)
    engine.outbox.on_poll = cancel_at_two
    while engine.worker.step():
        pass
    engine.outbox.on_poll = lambda: None
    assert engine.outbox.steps["cut"][-1][1] == 2
    assert "cut" not in engine.outbox.outputs and engine.worker.running() == 0


def test_the_card_says_what_the_class_can_do(engine: Engine) -> None:
    card = engine.card
    facts: dict[str, tuple[Any, ...]] = {
        "StableDiffusionXLPipeline": ("image-to-image", 16, 1, 16, 50, 5.0, ("T2I", "TI2I")),
        "SanaPipeline": ("none", 32, 1, 16, 20, 4.5, ("T2I",)),
        "LTXPipeline": ("none", 32, 8, 25, 50, 3.0, ("T2I", "T2V")),
    }
    assert facts[card.pipeline_class] == _facts(card)


def _facts(card: ModelCard) -> tuple[Any, ...]:
    defaults = card.defaults
    return (
        card.edits,
        card.size_multiple,
        card.frame_multiple,
        defaults.fps,
        defaults.num_inference_steps,
        defaults.guidance_scale,
        card.tasks,
    )


def picture(path: Path, case: Case) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, case.width), np.linspace(0, 255, case.height))
    made = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    made.save(path)
    return made


def test_sdxl_from_a_picture(tiny_sdxl: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    engine = Engine(tiny_sdxl, CASES["tiny_sdxl"])
    given = picture(tmp_path / "in.png", engine.case)
    (clip,) = engine.run("job", seed=3, strength=0.7, images=(str(tmp_path / "in.png"),))
    engine.theirs = StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_sdxl)
    plain = engine.expected(3, image=given, strength=0.7, width=None, height=None)
    assert np.abs(clip - plain).max() <= 1.01


def test_ltx_from_a_picture(tiny_ltx: Path, tmp_path: Path) -> None:
    """Named in model_index.json, as repositories of such models do."""
    from diffusers import LTXImageToVideoPipeline

    folder = Path(shutil.copytree(tiny_ltx, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "LTXImageToVideoPipeline"})
    )
    engine = Engine(folder, CASES["tiny_ltx"])
    assert isinstance(engine.theirs, LTXImageToVideoPipeline)
    assert (engine.card.tasks, engine.card.min_images) == (("I2V",), 1)
    given = picture(tmp_path / "in.png", engine.case)
    (clip,) = engine.run("job", seed=3, images=(str(tmp_path / "in.png"),))
    assert np.abs(clip - engine.expected(3, image=given)).max() <= 1.01


def test_a_family_with_a_recipe_runs_here_when_asked_to(tiny_flux_a: Path) -> None:
    clips = []
    for backend in ("native", "diffusers"):
        options = EngineOptions(model_path=str(tiny_flux_a), backend=backend)
        outbox = RecordingOutbox()
        worker = DiffusionWorker(lambda note, o=options: open_pipeline(o, note), options, outbox)
        assert worker.load()["backend"] == backend
        card = open_pipeline(options, lambda note: None).card
        wish = SamplingParams(
            prompt="a red fox", width=48, height=32, num_inference_steps=2, seed=4
        )
        params = dataclasses.asdict(card.resolve(wish, video=False))
        worker.submit("job", {"params": {**params, "max_sequence_length": 64}})
        while worker.step():
            pass
        assert not outbox.errors
        clips.append(np.asarray(outbox.outputs["job"][0]).astype(float))
    assert np.abs(clips[0] - clips[1]).max() <= 1
