"""Decoding pictures from outside: known formats, bounded size, one frame, nothing but pixels left.

Blocks and may take a second for a large picture: call it in a thread (`server/inputs.py` does).
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import RequestError, SglError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_SCANS = 100  # of a progressive JPEG; each costs a pass over the whole picture
_ORIENTATION = 0x0112


def decode_picture(data: bytes, *, param: str, max_pixels: int = MAX_PIXELS) -> Image:
    """The picture in `data` as RGB, or RGBA where it has transparency; upright, without metadata.

    The content decides the format, never a name or a declared type.
    """
    try:
        return _decode(data, param, max_pixels)
    except SglError:
        raise
    except Exception:  # Pillow raises OSError, ValueError, SyntaxError, struct.error and more
        raise RequestError("The picture is damaged.", code="invalid_image", param=param) from None


def _decode(data: bytes, param: str, max_pixels: int) -> Image:
    import PIL.Image

    PIL.Image.MAX_IMAGE_PIXELS = None  # its cap is a warning; ours comes before any pixel
    if data.startswith(b"RIFF"):
        _check_webp(data, param, max_pixels)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise _too_large(f"The picture has more than {_MAX_SCANS} scans.", param)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise _unsupported("The file is no PNG, JPEG or WebP picture.", param) from None
    with image:
        _check_size(*image.size, param, max_pixels)
        if getattr(image, "n_frames", 1) != 1:
            raise _unsupported("The picture is animated.", param)
        orientation = 1
        with contextlib.suppress(Exception):  # broken EXIF is no reason to refuse the pixels
            orientation = image.getexif().get(_ORIENTATION, 1)
        image.load()
        return _upright(_plain(image), orientation)


def _check_size(width: int, height: int, param: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _too_large(
            f"The picture has {width}x{height} pixels; the limit is {max_pixels / 1e6:g} million.",
            param,
        )


def _check_webp(data: bytes, param: str, max_pixels: int) -> None:
    """Pillow allocates the canvas of a WebP when it opens it, so its header is read before."""
    kind, head = data[12:16], data[20:30]
    if len(head) < 10:
        return
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    _check_size(width, height, param, max_pixels)


def _plain(image: Image) -> Image:
    """RGB or RGBA with eight bits a channel."""
    if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip it instead of scaling
        image = _eight_bits(image)
    clear = "A" in image.mode or "transparency" in image.info
    plain = image.convert("RGBA" if clear else "RGB")
    plain.info.clear()
    return plain


def _eight_bits(image: Image) -> Image:
    import numpy as np
    import PIL.Image

    values: Any = np.asarray(image).astype(np.uint32)
    return PIL.Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation)
    return image if turn is None else image.transpose(turn)


def _unsupported(what: str, param: str) -> RequestError:
    return RequestError(
        what,
        hint="Send one still picture as PNG, JPEG or WebP.",
        code="unsupported_image_format",
        param=param,
    )


def _too_large(what: str, param: str) -> RequestError:
    return RequestError(what, hint="Send a smaller one.", code="image_too_large", param=param)
