"""What the encoders write, other programs read back."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.server.media import encode_image, encode_video


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


def test_quality_counts_for_videos(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    sizes = []
    for quality in (0, 50, 100):
        encode_video(noise, tmp_path / "q.mp4", fps=8, quality=quality)
        sizes.append((tmp_path / "q.mp4").stat().st_size)
    assert sizes == sorted(sizes) and sizes[2] > 2 * sizes[0]


def test_index_comes_first(tmp_path):
    encode_video(smooth(5, 32, 32), tmp_path / "c.mp4", fps=8)
    data = (tmp_path / "c.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_odd_sizes_are_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="even"):
        encode_video(smooth(1, 15, 16), tmp_path / "c.mp4", fps=8)
