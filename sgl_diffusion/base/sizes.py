"""The sizes of pictures that a model takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import RequestError

if TYPE_CHECKING:
    from sgl_diffusion.base.params import ModelCard


def edge(card: ModelCard, param: str, value: int) -> int:
    unit, most = card.size_multiple, card.max_edge
    if unit <= value <= most and value % unit == 0:
        return value
    below = min(max(value // unit * unit, unit), most // unit * unit)
    above = min(below + unit, most // unit * unit)
    nearest = f"{below}" if value <= below or below == above else f"{below} or {above}"
    raise RequestError(
        f"{param} {value} is not a multiple of {unit} from {unit} to {most}.",
        hint=f"Nearest: {nearest}.",
        code="invalid_size",
        param=param,
    )


def size_like(
    card: ModelCard, size: tuple[int, int], width: int | None, height: int | None
) -> tuple[int, int]:
    """The nearest with the aspect of `size`: with the default's area, or with the one edge that is
    given."""
    across, down = size
    unit, area = card.size_multiple, card.defaults.width * card.defaults.height
    most = card.max_edge // unit

    def nearest(edge: float) -> int:
        return min(max(round(edge / unit), 1), most) * unit

    if width is not None:
        return width, nearest(width * down / across)
    if height is not None:
        return nearest(height * across / down), height
    ratio = math.sqrt(across / down)
    return nearest(math.sqrt(area) * ratio), nearest(math.sqrt(area) / ratio)
