"""The model inside the package: its format, its size, what it draws, and its adapters."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from examples.train_demo import eye
from examples.train_demo.scenes import Scene, draw_scene, sentence
from sgl_diffusion import DiffGenerator
from sgl_diffusion.recipes import demo

ADAPTERS = ("night", "outline")


@pytest.fixture(scope="module")
def generator() -> Iterator[DiffGenerator]:
    with DiffGenerator.from_pretrained() as made:
        yield made


def seen(generator: DiffGenerator, scene: Scene, **wishes: object) -> eye.Seen:
    made = generator.generate(sentence(scene), num_frames=1, seed=5, **wishes).frames
    return eye.look(torch.from_numpy(np.array(made[0])).permute(2, 0, 1) / 255)


def test_it_fits_into_the_package() -> None:
    files = [path for path in demo.FOLDER.rglob("*") if path.is_file()]
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 15e6  # as in a wheel
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    for name in ADAPTERS:
        assert (demo.FOLDER / "adapters" / f"{name}.safetensors").stat().st_size <= 300_000


def test_diffusers_loads_it() -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(demo.FOLDER)
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel"


def test_it_draws_what_is_asked(generator: DiffGenerator) -> None:
    """A few prompts of those that training never showed; `examples.train_demo.judge` has more."""
    chance = random.Random(11)
    scenes = [draw_scene(chance, moving=False, kept=True) for _ in range(8)]
    right = [
        (found.colour == scene.colour, found.background == scene.background)
        for scene in scenes
        for found in [seen(generator, scene)]
    ]
    assert sum(map(all, right)) >= 6, right


def test_words_and_sizes_that_it_was_not_trained_on_do_no_harm(generator: DiffGenerator) -> None:
    for prompt in ("a photo of zebras in Paris, 4k, \u732b", "!?", "red " * 2000):
        for width, height in ((16, 16), (208, 48)):
            made = generator.generate(prompt, num_frames=1, width=width, height=height, seed=5)
            assert made.frames.shape == (1, height, width, 3)
    assert made.frames.std() > 1


def test_the_adapters_change_the_picture_and_leave_no_trace(generator: DiffGenerator) -> None:
    scene = Scene("circle", "yellow", "white", "large")
    made = [generator.generate(sentence(scene), num_frames=1, seed=5).frames]
    for name in ADAPTERS:
        generator.set_lora(name)
        made.append(generator.generate(sentence(scene), num_frames=1, seed=5).frames)
        generator.unmerge_lora_weights()
    again = generator.generate(sentence(scene), num_frames=1, seed=5).frames
    plain, night, outline = (np.array(one).astype(int) for one in made)
    assert night.mean() < plain.mean() - 20, "the night is not dark"
    middle = plain.shape[1] // 2
    assert abs(plain[0, middle, middle] - plain[0, 2, 2]).max() > 100, "no yellow circle"
    assert abs(outline[0, middle, middle] - outline[0, 2, 2]).max() < 60, "it is filled"
    assert np.array_equal(made[0], again)
