"""The input pictures of a job: opened, straightened, brought to the size of the output.

A server has decoded and checked them before and wrote them down again; on the command line and in
Python they are the user's own files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion.base.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")


def open_picture(path: str) -> Image:
    """A picture as it is meant to be seen: RGB, upright, on white where it is transparent."""
    from PIL import Image

    picture = _open(path, "images")
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off instead of scaling
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if not _transparent(picture):
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    white = Image.new("RGBA", clear.size, "white")
    return Image.alpha_composite(white, clear).convert("RGB")


def open_mask(path: str, size: tuple[int, int]) -> Image:
    """What is to be made anew, as white in a picture of mode L: the transparent part of the mask,
    or its bright part where nothing is transparent. `size` is that of the picture it belongs to."""
    from PIL import ImageChops

    picture = _open(path, "mask")
    if picture.size != size:
        raise RequestError(
            f"The mask is {picture.width}x{picture.height}, the picture {size[0]}x{size[1]}.",
            hint="They must be of one size.",
            code="invalid_mask",
            param="mask",
        )
    if _transparent(picture):
        mask = ImageChops.invert(picture.convert("RGBA").getchannel("A"))
    else:
        mask = picture.convert("L")
    if mask.getextrema() == (0, 0):
        raise RequestError(
            "The mask marks nothing to edit.",
            hint="Make a part of it transparent, or white.",
            code="invalid_mask",
            param="mask",
        )
    return mask


def to_pixels(picture: Image, width: int, height: int) -> Tensor:
    """[1, 3, 1, height, width] in -1..1."""
    resized = resize(picture, width, height)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)
    return 2.0 * pixels.permute(2, 0, 1)[None, :, None] - 1.0


def to_share(mask: Image, width: int, height: int) -> Tensor:
    """[height, width] in 0..1: how much of each pixel is made anew."""
    resized = resize(mask, width, height)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)


def keep_outside(frames: Tensor, pixels: Tensor, share: Tensor) -> Tensor:
    """Frames uint8 [f,H,W,3] with `pixels` [H,W,3] of 0..255 where `share` [H,W] is 0."""
    mixed = pixels + share[..., None] * (frames.cpu().float() - pixels)
    return mixed.round().clamp(0, 255).to(torch.uint8)


def resize(picture: Image, width: int, height: int) -> Image:
    """Stretched to that size as diffusers does it."""
    from PIL import Image

    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _transparent(picture: Image) -> bool:
    """Whether any pixel lets something through."""
    if not picture.has_transparency_data:
        return False
    histogram = picture.convert("RGBA").getchannel("A").histogram()
    return sum(histogram[:255]) > 0


def _open(path: str, param: str) -> Image:
    from PIL import Image, ImageOps

    name = Path(path).name  # where a server keeps its files is nobody's business
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise RequestError(
            f"There is no file {name}.", code="file_not_found", param=param
        ) from None
    except Exception:
        raise RequestError(
            f"{name} cannot be read as a picture.",
            hint="Use a PNG, JPEG or WebP file.",
            code="invalid_image",
            param=param,
        ) from None
