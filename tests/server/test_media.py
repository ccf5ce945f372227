"""What the encoders write, other programs read back."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.server.media import (
    PRESETS,
    encode_image,
    encode_video,
    rate_factor,
    x264_kernels,
)

ROOT = Path(__file__).parents[2]


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    """Gentle slopes: halving the resolution of the colours costs little."""
    time = np.arange(frames)[:, None, None]
    down = np.arange(height)[None, :, None] * 1.5
    right = np.arange(width)[None, None, :] * 0.5
    red = down + right + time
    return np.stack([red, red[:, ::-1], 255 - red], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 80), (720, 1280)])
def test_png_is_exact(height, width):
    picture = smooth(1, height, width)[0]
    image = Image.open(io.BytesIO(encode_image(picture, "png", quality=1)))
    assert image.format == "PNG" and image.mode == "RGB"
    assert np.array_equal(np.asarray(image), picture)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_images_are_close_and_quality_counts(kind):
    picture = smooth(1, 64, 96)[0]
    sizes = []
    for quality in (0, 30, 75, 100):
        data = encode_image(picture, kind, quality)
        image = Image.open(io.BytesIO(data))
        assert image.format == kind.upper() and image.size == (96, 64)
        sizes.append(len(data))
    error = np.asarray(image, dtype=int) - picture
    assert np.abs(error).mean() < 2
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("frames", [1, 2, 5, 17, 33])
@pytest.mark.parametrize(("fps", "height", "width"), [(16, 48, 64), (7, 16, 16), (24, 80, 48)])
def test_video(tmp_path, frames, fps, height, width):
    clip = smooth(frames, height, width)
    path = tmp_path / "clip.part"  # the name says nothing about the format
    encode_video(clip, path, fps=fps, quality=95)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert container.format.name.startswith("mov,mp4") and len(container.streams) == 1
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (width, height)
        assert (stream.frames, stream.average_rate) == (frames, fps)
        assert stream.duration * stream.time_base * fps == frames
        decoded = list(container.decode(stream))
    assert [round(frame.pts * frame.time_base * fps) for frame in decoded] == list(range(frames))
    back = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(int)
    assert np.abs(back - clip).mean() < 3


def test_colours_survive(tmp_path):
    """Flat colours come back: the matrix in the file is the one that was used."""
    colours = np.array([(200, 40, 30), (20, 60, 220), (30, 200, 60), (128, 128, 128)], np.uint8)
    clip = np.repeat(colours[None, :, None], 3, axis=0).repeat(64, axis=2).repeat(16, axis=1)
    encode_video(clip, tmp_path / "c.mp4", fps=8, quality=100)
    with av.open(str(tmp_path / "c.mp4")) as container:
        for frame in container.decode(video=0):
            back = frame.to_ndarray(format="rgb24")[8::16, 32].astype(int)
            assert np.abs(back - colours).max() <= 4


def read_back(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def textured(frames: int, height: int, width: int) -> np.ndarray:
    """Slopes with grain that moves: something for the encoder to throw away."""
    grain = np.random.default_rng(0).normal(0, 12, (frames, height, width, 1))
    return (smooth(frames, height, width) * 0.8 + 25 + grain).clip(0, 255).astype(np.uint8)


def test_size_and_likeness_fall_with_the_quality(tmp_path):
    clip, path = textured(5, 64, 96), tmp_path / "q.mp4"
    sizes, likeness = [], []
    for quality in (100, 90, 75, 55, 50, 35, 20, 0):
        encode_video(clip, path, fps=8, quality=quality)
        sizes.append(path.stat().st_size)
        error = np.square(read_back(path).astype(float) - clip).mean()
        likeness.append(10 * np.log10(255**2 / error))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 5 * sizes[-1]
    assert likeness == sorted(likeness, reverse=True) and likeness[0] > likeness[-1] + 6


def test_the_rate_factor_is_monotone():
    factors = [rate_factor(quality) for quality in range(101)]
    assert factors[0] == 40 and factors[-1] == 6
    assert all(worse > better for worse, better in zip(factors, factors[1:], strict=False))


def test_presets(tmp_path):
    clip = textured(9, 64, 96)
    sizes = {}
    for preset in PRESETS:
        encode_video(clip, tmp_path / "p.mp4", fps=8, preset=preset)
        sizes[preset] = (tmp_path / "p.mp4").stat().st_size
        assert len(read_back(tmp_path / "p.mp4")) == 9
    assert sizes["ultrafast"] > sizes["veryslow"]


def test_equal_frames_are_equal_files(tmp_path):
    """Also where memory holds other values before: the encoder reads nothing it did not write."""
    encode = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from sgl_diffusion.server.media import encode_video\n"
        "encode_video(np.load(sys.argv[1]), Path(sys.argv[2]), fps=8)"
    )
    np.save(tmp_path / "clip.npy", textured(17, 96, 272))  # 17 macroblocks: no whole vector
    digests = set()
    for fill in ("1", "77", "170", "254"):  # what the allocator puts into new memory
        path = tmp_path / f"{fill}.mp4"
        environment = {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.perturb={fill}"}
        arguments = [str(tmp_path / "clip.npy"), str(path)]
        subprocess.run(
            [sys.executable, "-c", encode, *arguments], check=True, env=environment, cwd=ROOT
        )
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_x264_gets_no_avx512():
    assert x264_kernels("processor: 0\nflags\t\t: sse4_2 avx fma avx2 avx512f bmi2\n")
    assert x264_kernels("processor: 0\nflags\t\t: sse4_2 avx fma avx2 bmi2\n") == ""
    assert x264_kernels("processor: 0\nFeatures\t: fp asimd\n") == ""


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_likeness_of_images_falls_with_the_quality(kind):
    picture = textured(1, 64, 96)[0]
    errors = []
    for quality in (100, 90, 75, 55, 35, 10):
        back = np.asarray(Image.open(io.BytesIO(encode_image(picture, kind, quality))))
        errors.append(np.square(back.astype(float) - picture).mean())
    assert errors == sorted(errors) and errors[-1] > 2 * errors[0]


def test_index_comes_first(tmp_path):
    encode_video(smooth(5, 32, 32), tmp_path / "c.mp4", fps=8)
    data = (tmp_path / "c.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_odd_sizes_are_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="even"):
        encode_video(smooth(1, 15, 16), tmp_path / "c.mp4", fps=8)
