"""`DiffGenerator`: the same worker from plain Python, with threads that end."""

from __future__ import annotations

import _thread
import gc
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sgl_diffusion import DiffGenerator
from sgl_diffusion.base.errors import (
    ConfigError,
    EngineError,
    RequestError,
    SetupError,
    UnavailableError,
)
from sgl_diffusion.client.types import Snapshot
from tests.client.painter import CARD, painter_app
from tests.orchestrator.play import descriptors


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    files = descriptors()
    yield
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) - before == set()
    assert not descriptors() - files


def test_pictures_and_clips() -> None:
    with DiffGenerator(painter_app()) as generator:
        assert generator.card == CARD
        picture = generator.generate("a cat", num_frames=1, seed=5)
        assert picture.frames.shape == (1, 16, 32, 3)
        (image,) = picture.images()
        assert image.size == (32, 16) and image.getpixel((0, 0)) == (5, 5, 5)
        assert generator.generate("a cat").frames.shape == (5, 16, 32, 3)
        several = generator.generate(prompt="a cat", num_frames=9, num_outputs=2, seed=[1, 2])
        assert [int(clip[0, 0, 0, 0]) for clip in several.clips] == [1, 2]
        assert several.params.num_frames == 9


def test_progress_comes_in_the_callers_thread() -> None:
    seen: list[tuple[Snapshot, threading.Thread]] = []

    def note(snapshot: Snapshot) -> None:
        seen.append((snapshot, threading.current_thread()))

    with DiffGenerator(painter_app(sleep=0.02)) as generator:
        generator.generate("a cat", num_inference_steps=5, on_progress=note)
    assert [snapshot.step for snapshot, _ in seen if snapshot.step][-1] == 5
    assert seen[-1][0].state == "completed"
    assert {thread for _, thread in seen} == {threading.current_thread()}


def test_wrong_arguments_are_named() -> None:
    with DiffGenerator(painter_app()) as generator:
        with pytest.raises(RequestError, match="'num_inference_steps'") as caught:
            generator.generate("a cat", num_inference_step=3)
        assert caught.value.param == "num_inference_step"
        with pytest.raises(RequestError, match="width 33"):
            generator.generate("a cat", width=33)
        for wrong in (
            {"prompt": None}, {"num_frames": "5"}, {"seed": [1, "2"]}, {"fps": True},
            {"guidance_scale": 10**400},
        ):  # fmt: skip
            with pytest.raises(RequestError, match=next(iter(wrong))):
                generator.generate(**{"prompt": "a cat", **wrong})
        with pytest.raises(EngineError, match="ValueError"):
            generator.generate("fail")
        assert generator.generate("a cat").clips
    with pytest.raises(ConfigError, match="'device'"):
        DiffGenerator.from_pretrained(devise="cpu")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_cancels_the_job(interruptible: None) -> None:
    with DiffGenerator(painter_app(sleep=0.02)) as generator:

        def interrupt(snapshot: Snapshot) -> None:
            if snapshot.step == 3:
                # As Ctrl-C does it: while the caller's thread waits.
                threading.Timer(0.05, _thread.interrupt_main).start()

        with pytest.raises(KeyboardInterrupt):
            generator.generate("a cat", num_inference_steps=200, on_progress=interrupt)
        look = generator._loop.run(generator._client.control("look"))
        assert look["running"] == 0 and look["steps"] < 200
        assert generator.generate("a cat").clips


def test_an_error_in_the_callback_cancels_the_job() -> None:
    def stumble(snapshot: Snapshot) -> None:
        if snapshot.step:
            raise LookupError("mine")

    with DiffGenerator(painter_app(sleep=0.02)) as generator:
        with pytest.raises(LookupError, match="mine"):
            generator.generate("a cat", num_inference_steps=200, on_progress=stumble)
        look = generator._loop.run(generator._client.control("look"))
        assert look["running"] == 0


def test_a_model_that_cannot_be_loaded_is_the_callers_error() -> None:
    with pytest.raises(SetupError, match="The weights are bad") as caught:
        DiffGenerator(painter_app(refuse_while="/"))
    assert caught.value.code == "bad_weights"


def test_shutdown_is_final_and_may_come_twice() -> None:
    generator = DiffGenerator(painter_app())
    generator.shutdown()
    generator.shutdown()
    with pytest.raises(UnavailableError):
        generator.generate("a cat")


def test_a_forgotten_generator_ends_its_threads() -> None:
    generator = DiffGenerator(painter_app())
    assert generator.generate("a cat").clips
    del generator
    gc.collect()


def test_pictures_to_begin_with(tmp_path: Path) -> None:
    """Paths of every kind; the output has the picture's shape unless it is told another."""
    path = tmp_path / "in.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: 400 wide, 100 high as it is seen
    Image.new("RGB", (100, 400)).save(path, exif=exif)
    with DiffGenerator(painter_app()) as generator:
        for images in (str(path), path, [path], (str(path),)):
            params = generator.resolve("a cat", images=images, strength=0.3)
            assert (params.images, params.strength, params.num_frames) == ((str(path),), 0.3, 1)
        assert (params.width, params.height) == (48, 16)
        params = generator.resolve("a cat", images=path, width=64, height=64)
        assert (params.width, params.height) == (64, 64)
        assert generator.generate("a cat", images=path, seed=3).frames.shape == (1, 16, 48, 3)
        (tmp_path / "text.png").write_text("no picture")
        for name, words in (("none.png", "No such file"), ("text.png", "no PNG, JPEG or WebP")):
            with pytest.raises(RequestError, match=words):
                generator.resolve("a cat", images=tmp_path / name)
