"""Input pictures of library and command-line users: files of their own, looked at before a job."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import ModelCard, SamplingParams

_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


def as_paths(images: Any) -> tuple[str, ...]:
    """One path, or several."""
    several = [images] if isinstance(images, str | os.PathLike) else images
    return tuple(os.fspath(path) for path in several)


def shaped(card: ModelCard, wish: SamplingParams) -> SamplingParams:
    """The wish with the shape of its first picture, as far as it names no size of its own."""
    if not wish.images:
        return wish
    size = size_of(wish.images[0])
    if wish.width is not None and wish.height is not None:
        return wish
    width, height = card.size_like(*size, width=wish.width, height=wish.height)
    return replace(wish, width=width, height=height)


def size_of(path: str) -> tuple[int, int]:
    """Width and height as a viewer shows it; RequestError for what is no picture."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            width, height = picture.size
            turned = picture.getexif().get(_ORIENTATION) in _TURNED
    except OSError as error:
        reason = error.strerror or "it is no PNG, JPEG or WebP picture"
        raise RequestError(
            f"{path} cannot be read: {reason}.", code="invalid_image", param="images"
        ) from None
    return (height, width) if turned else (width, height)
