"""Input pictures as files hold them: turned, transparent, grey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.engine.pictures import open_mask, open_picture, to_pixels, to_share


def test_a_picture_is_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(str(tmp_path / "a.jpg")).size == (20, 30)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("L", (8, 8), 255).convert(mode).save(tmp_path / "a.png")
    opened = open_picture(str(tmp_path / "a.png"))
    assert opened.mode == "RGB" and opened.size == (8, 8)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "a.png")
    assert open_picture(str(tmp_path / "a.png")).getpixel((0, 0)) == (128, 128, 128)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    opened = np.asarray(open_picture(str(tmp_path / "a.png")))
    assert (opened[:, :2] == 255).all() and (opened[:, 2:] == 0).all()


def test_a_mask_is_transparent_or_bright(tmp_path: Path) -> None:
    clear = np.full((4, 6, 4), 255, np.uint8)
    clear[:, :3, 3] = 0
    bright = np.zeros((4, 6), np.uint8)
    bright[:, :3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(bright).save(tmp_path / "bright.png")
    for name in ("clear.png", "bright.png"):
        mask = np.asarray(open_mask(str(tmp_path / name), (6, 4)))
        assert (mask[:, :3] == 255).all() and (mask[:, 3:] == 0).all(), name


def test_sizes_are_reached_and_values_kept() -> None:
    pixels = to_pixels(Image.new("RGB", (30, 20), (0, 255, 127)), 64, 48)
    assert pixels.shape == (1, 3, 1, 48, 64)
    assert pixels[0, :, 0, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.00392], abs=1e-4)
    assert to_share(Image.new("L", (3, 2), 255), 16, 16).min() == 1.0


@pytest.mark.parametrize("name", ["a.gif", "a.tiff"])
def test_other_formats_are_not_opened(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(RequestError) as caught:
        open_picture(str(tmp_path / name))
    assert caught.value.code == "invalid_image"
