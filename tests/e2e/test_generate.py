"""`sglang generate` and the Python example, with the real tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
FAST = ("--size", "64x48", "--num-inference-steps", "2")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def run(data_dir, *args):
    done = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SGLD_DATA_DIR": str(data_dir)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def generate(data_dir, *args):
    return run(data_dir, "-m", "sgl_diffusion.cli", "generate", "--prompt", "A red fox!", *args)


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def test_images_in_a_folder(data_dir, tmp_path):
    args = ("--num-frames", "1", "--num-outputs", "2", "--seed", "5", *FAST)
    done = generate(data_dir, *args, "--output-path", str(tmp_path / "new"))
    paths = [tmp_path / "new" / f"a-red-fox-{seed}.png" for seed in (5, 6)]
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert re.fullmatch(rf"{path}  64x48  seed [56]  [\d.]+ s", line)
        assert opened(path).size == (64, 48)
        assert json.loads(opened(path).text["sgl_diffusion"])["prompt"] == "A red fox!"
    # Of progress that nobody has read yet only the newest is told.
    assert "\r[" not in done.stderr and "2/2 decode" in done.stderr


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("b.webp", "WEBP")])
def test_an_image_by_name(data_dir, tmp_path, name, kind):
    generate(data_dir, *FAST, "--output-path", str(tmp_path / "deep" / name))
    assert opened(tmp_path / "deep" / name).format == kind
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name]


def test_a_picture_from_a_picture(data_dir, tmp_path):
    given, mask, out = (tmp_path / name for name in ("in.png", "mask.png", "out.png"))
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(given)
    white = Image.new("L", (64, 48))
    white.paste(255, (32, 0, 64, 48))
    white.save(mask)
    args = ("--image", str(given), "--mask", str(mask), "--strength", "0.6")
    done = generate(data_dir, *args, *FAST, "--output-path", str(out))
    assert "64x48" in done.stdout
    before, after = opened(given), opened(out)
    assert before.crop((0, 0, 32, 48)).tobytes() == after.crop((0, 0, 32, 48)).tobytes()
    assert before.crop((32, 0, 64, 48)).tobytes() != after.crop((32, 0, 64, 48)).tobytes()


def test_a_video(data_dir, tmp_path):
    path = tmp_path / "fox.mp4"
    args = ("--num-frames", "9", "--fps", "12", "--no-metadata", *FAST)
    assert "9 frames" in generate(data_dir, *args, "--output-path", str(path)).stdout
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (64, 48, 9)
        assert stream.average_rate == 12
        assert "comment" not in container.metadata


def test_the_python_example(data_dir, tmp_path):
    done = run(data_dir, str(ROOT / "examples/generate.py"), "--output-path", str(tmp_path))
    assert "(17, 96, 96, 3) uint8" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["star-7.png", "star-8.png"]
