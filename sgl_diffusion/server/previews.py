"""Small pictures of a clip: a thumbnail, a sheet with frames from begin to end, and a picture of it
while it is made."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from sgl_diffusion.client.types import Partial
    from sgl_diffusion.server.media import Array

SHEET_COLUMNS = 5
_SHEET_TILES = 25
_THUMBNAIL_EDGE = 512
_TILE_EDGE = 256
_QUALITY = 80


@dataclass(frozen=True)
class Preview:
    """What a video looked like after `step`, as JPEG."""

    step: int
    data: bytes


def thumbnail(clip: Array) -> bytes:
    """The frame in the middle, as WebP; no edge is longer than 512."""
    return _file(_picture(clip, len(clip) // 2, _THUMBNAIL_EDGE), "WEBP")


def sheet_frames(count: int) -> list[int]:
    """Which of `count` frames a sheet shows: at most 25, the first and the last among them."""
    tiles = min(count, _SHEET_TILES)
    return [round(tile * (count - 1) / max(tiles - 1, 1)) for tile in range(tiles)]


def spritesheet(clip: Array) -> bytes:
    """Frames in reading order, five in a row, as JPEG; what is left of the last row is black."""
    from PIL import Image

    chosen = sheet_frames(len(clip))
    tiles = [_picture(clip, frame, _TILE_EDGE) for frame in chosen]
    width, height = tiles[0].size
    columns = min(len(tiles), SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(tiles) / columns)))
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * width, place // columns * height))
    return _file(sheet, "JPEG")


def preview_of(partial: Partial) -> Preview:
    """No edge is longer than 512."""
    return Preview(partial.step, _file(_picture(partial.picture[None], 0, _THUMBNAIL_EDGE), "JPEG"))


def _picture(clip: Array, frame: int, edge: int) -> Image:
    from PIL import Image

    picture = Image.fromarray(clip[frame])
    picture.thumbnail((edge, edge), reducing_gap=2.0)  # never enlarges
    return picture


def _file(picture: Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=_QUALITY)
    return buffer.getvalue()
