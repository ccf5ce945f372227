"""The decode guard: what comes in right, and what is refused before it costs anything."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.pictures import decode_picture


def file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def slope(width: int = 48, height: int = 32) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 7, columns * 5, rows + columns], -1).astype(np.uint8))


def png(width: int, height: int, depth: int = 1) -> bytes:
    """A PNG whose header says more than its pixels hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b"")]
    )


def code(data: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        decode_picture(data, param="image")
    assert caught.value.param == "image"
    return caught.value.code


def decode(data: bytes) -> Image.Image:
    image = decode_picture(data, param="image")
    assert not image.info and not image.getexif()
    return image


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless_pictures_come_through(kind):
    image = decode(file(slope(), kind, lossless=True))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(slope()))


def test_jpeg():
    image = np.asarray(decode(file(slope(), "jpeg", quality=95))).astype(int)
    assert np.abs(image - np.asarray(slope())).mean() < 3


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK")
    red, green, blue = np.asarray(decode(file(red, "jpeg"))).reshape(-1, 3).mean(0)
    assert red > 230 and green < 45 and blue < 45


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32_768, 65_535]], dtype=np.uint16)
    image = decode(file(Image.fromarray(values), "png"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_gray_and_one_bit():
    gray = decode(file(Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8)), "png"))
    assert gray.mode == "RGB" and np.asarray(gray)[0, 1].tolist() == [100] * 3
    black = decode(file(Image.new("1", (4, 4), 1), "png"))
    assert black.mode == "RGB" and np.asarray(black).min() == 255


def test_palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putdata([0, 1])
    pixels = np.asarray(decode(file(image, "png", transparency=0)))
    assert pixels[0].tolist() == [[200, 10, 20, 0], [30, 40, 50, 255]]


def test_alpha_stays():
    clear = Image.new("RGBA", (3, 3), (1, 2, 3, 77))
    assert np.asarray(decode(file(clear, "png")))[0, 0].tolist() == [1, 2, 3, 77]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_dropped(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(slope(), "png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


def test_broken_exif_does_not_matter():
    assert decode(file(slope(), "jpeg", exif=b"Exif\0\0garbage")).size == (48, 32)


@pytest.mark.parametrize("kind", ["gif", "tiff", "ico", "bmp", "ppm", "eps", "pdf", "icns"])
def test_other_formats(kind):
    assert code(file(slope(64, 64), kind)) == "unsupported_image_format"


@pytest.mark.parametrize(
    "data",
    [b"hello", b"<html></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
     b"%!PS-Adobe-3.0 EPSF", b"\0" * 1000],
)  # fmt: skip
def test_no_pictures(data):
    assert code(data) == "unsupported_image_format"


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_animations(kind):
    frames = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(5)]
    data = file(frames[0], kind, save_all=True, append_images=frames[1:])
    assert code(data) == "unsupported_image_format"


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_400, 9_400), (2**31 - 1, 1)])
def test_size_is_read_before_pixels(size):
    tracemalloc.start()
    assert code(png(*size)) == "image_too_large"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("lossless", [True, False])
def test_size_of_webp_is_read_before_pillow_opens_it(lossless, monkeypatch):
    data = file(Image.new("RGB", (9_000, 5_000)), "webp", lossless=lossless, method=0, quality=0)
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("opened"))
    assert code(data) == "image_too_large"


def test_a_progressive_jpeg_with_many_scans():
    data = file(slope(), "jpeg", progressive=True)
    assert decode(data).size == (48, 32)
    assert code(data[:-2] + b"\xff\xda\0\0" * 200 + data[-2:]) == "image_too_large"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_truncation_is_one_of_ours(kind):
    data = file(slope(), kind)
    for length in range(0, len(data) - 40, max(len(data) // 60, 1)):
        assert code(data[:length]) in ("invalid_image", "unsupported_image_format")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_flipped_bytes_never_escape(kind):
    data = file(slope(), kind)
    for position in range(0, len(data), max(len(data) // 120, 1)):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        try:
            decode_picture(bytes(broken), param="image")
        except RequestError as error:
            assert error.code in ("invalid_image", "unsupported_image_format", "image_too_large")
