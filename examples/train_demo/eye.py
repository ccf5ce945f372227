"""The automatic eye: says what a picture shows, by colours, contour and way, without the model.

Background: the middle colour of the border. Shape: the pixels nearer to another colour, moved into
a square and compared with the contour of every shape the scenes know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.train_demo.scenes import COLOURS, SHAPES, distance

_GRID = 48
_FEW = 12  # pixels that are no shape


@dataclass(frozen=True)
class Seen:
    shape: str | None
    colour: str | None
    background: str
    middle: tuple[float, float]  # of width and height, 0 in the centre
    extent: float  # of the shorter side


def look(picture: Tensor) -> Seen:
    """What `picture`, [3, height, width] in 0..1, shows."""
    _, height, width = picture.shape
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    back = border.median(dim=1).values
    away = (picture - back[:, None, None]).norm(dim=0)
    mask = away > max(0.18, 0.5 * float(away.quantile(0.995)))
    ys, xs = mask.nonzero(as_tuple=True)
    if len(ys) < _FEW:
        return Seen(None, None, _nearest(back), (0.0, 0.0), 0.0)
    fore = picture[:, mask & (away >= away[mask].median())].median(dim=1).values
    top, bottom, left, right = (int(v) for v in (ys.min(), ys.max(), xs.min(), xs.max()))
    middle = ((left + right + 1) / 2 / width - 0.5, (top + bottom + 1) / 2 / height - 0.5)
    extent = max(right - left, bottom - top) / min(width, height)
    shape = _likest(mask[top : bottom + 1, left : right + 1])
    return Seen(shape, _nearest(fore), _nearest(back), middle, extent)


def way(clip: Tensor) -> str | None:
    """Where the shape of `clip`, [frames, 3, height, width], goes; None where it stays."""
    first, last = look(clip[0]).middle, look(clip[-1]).middle
    across, along = last[0] - first[0], last[1] - first[1]
    if max(abs(across), abs(along)) < 0.05:
        return None
    if abs(across) > abs(along):
        return "left" if across < 0 else "right"
    return "up" if along < 0 else "down"


def _nearest(colour: Tensor) -> str:
    far = {
        name: float((torch.tensor(value) / 255 - colour).norm()) for name, value in COLOURS.items()
    }
    return min(far, key=lambda name: far[name])


def _likest(cut: Tensor) -> str:
    """The shape whose contour, as large as the cut-out, shares most with it."""
    found = _squared(cut)
    shared = {
        name: float(torch.minimum(found, kind).sum() / torch.maximum(found, kind).sum())
        for name, kind in _contours().items()
    }
    return max(shared, key=lambda name: shared[name])


@cache
def _contours() -> dict[str, Tensor]:
    return {shape: _contour(shape) for shape in SHAPES}


def _contour(shape: str) -> Tensor:
    """The shape, drawn large and moved into the square of the cut-outs."""
    at = torch.linspace(-1.3, 1.3, 521)
    inside = distance(shape, at[None, :], at[:, None], 1.0) < 0
    ys, xs = inside.nonzero(as_tuple=True)
    return _squared(inside[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def _squared(cut: Tensor) -> Tensor:
    """In the middle of a square of one size for all."""
    height, width = cut.shape
    side = max(height, width)
    padded = F.pad(
        cut.float(),
        ((side - width) // 2, side - width - (side - width) // 2)
        + ((side - height) // 2, side - height - (side - height) // 2),
    )
    return F.interpolate(padded[None, None], (_GRID, _GRID), mode="area")[0, 0]
