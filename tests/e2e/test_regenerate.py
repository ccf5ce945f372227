"""`sglang regenerate`: files of the real tiny model, made again from what they carry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).parents[2]
SMALL = ("--size", "64x48", "--num-inference-steps", "2")
# One process runs them all: what takes time is the start of Python.
RUN = """
import json, sys
from sgl_diffusion.cli.sglang import main
for command in json.loads(sys.argv[1]):
    print("status", main(command), flush=True)
"""


def run(folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SGLD_DATA_DIR": str(folder / "data")},
        check=True,
    )


def pixels(path: Path) -> bytes:
    if path.suffix == ".mp4":
        with av.open(str(path)) as film:
            return b"".join(frame.to_ndarray().tobytes() for frame in film.decode(video=0))
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_the_same_pixels_again(tmp_path: Path) -> None:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / "mask.png")
    make = ["generate", "--prompt", 'A red "fox", überall!', *SMALL, "--seed", "9"]
    inputs = ["--image", "a.png", "--mask", "mask.png"]
    done = run(
        tmp_path,
        [*make, "--num-frames", "1", "--output-path", "a.png"],
        ["regenerate", "a.png", "--output-path", "b.png"],
        ["regenerate", "a.png"],
        [*make, "--num-frames", "9", "--guidance-scale", "3", "--output-path", "a.mp4"],
        ["regenerate", "a.mp4", "--output-path", "b.mp4"],
        [*make, *inputs, "--strength", "0.6", "--output-path", "a.webp"],
        ["regenerate", "a.webp", *inputs, "--output-path", "b.webp"],
    )
    assert done.stdout.count("status 0") == 7, done.stdout + done.stderr
    assert done.stderr.count("same pixels as a.png") == 2
    assert "not the same" not in done.stderr
    for kind in ("png", "mp4", "webp"):
        first, second = (tmp_path / f"{name}.{kind}" for name in "ab")
        assert pixels(first) == pixels(second)
        # Made again, a file is the same file: its settings are complete.
        assert first.read_bytes() == second.read_bytes()
    assert pixels(tmp_path / "outputs" / "a-red-fox-überall-9.png") == pixels(tmp_path / "a.png")


def with_settings(path: Path, **changes: object) -> str:
    settings = {"software": "sgl_diffusion", "model": "x/y", "prompt": "a", "seed": 1, **changes}
    text = PngImagePlugin.PngInfo()
    text.add_itxt("sgl_diffusion", json.dumps(settings))
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path, pnginfo=text)
    return str(path)


def test_what_cannot_be_made_again_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no film")
    edited = with_settings(tmp_path / "edited.png", images=2)
    masked = with_settings(tmp_path / "masked.png", images=1, mask=True)
    film = with_settings(tmp_path / "film.png", num_frames=17)
    lost = with_settings(tmp_path / "lost.png", model="/no/such/model")
    adapters = with_settings(tmp_path / "adapters.png", loras=[{"nick": 1}])
    elsewhere = with_settings(tmp_path / "elsewhere.png", loras=[{"nickname": "ink"}])
    cases = [
        (["nothing.png"], "There is no file nothing.png"),
        (["plain.png"], "plain.png carries no settings"),
        (["text.png"], "text.png carries no settings"),
        (["text.mp4"], "text.mp4 carries no settings"),
        ([edited], "was made from 2 pictures, and none given"),
        ([film, "--image", film], "was made from no pictures, and 1 given"),
        ([masked, "--image", film], "was made with a mask"),
        ([film, "--output-path", "film.png"], "17 frames do not fit into a .png file"),
        ([lost], "which is no folder here"),
        ([adapters], "adapters in the file cannot be read"),
        ([elsewhere], "made with the adapter 'ink' and does not say where"),
        ([elsewhere, "--lora-path", "x/y"], "made with the adapter 'ink'"),
        ([film, "--model-path", "/no/such/model"], "/no/such/model"),
        ([], "arguments are required: FILE"),
    ]
    done = run(tmp_path, *(["regenerate", *args] for args, _ in cases))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(cases), done.stderr
    for error, (args, word) in zip(errors, cases, strict=True):
        assert word in error, args
    assert "loading" not in done.stderr
    assert set(done.stdout.splitlines()) == {"status 2", "status 4"}


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_settings_come_back_as_they_went_in(tmp_path: Path, kind: str) -> None:
    from sgl_diffusion.server.media import encode_image
    from sgl_diffusion.server.metadata import read_settings

    settings = {"software": "s", "model": "m", "prompt": "über\n\u4f60 \\ \"'", "seed": 7}
    picture = np.zeros((16, 16, 3), np.uint8)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(encode_image(picture, kind, settings=json.dumps(settings)))
    assert read_settings(path) == settings
