"""The automatic eye: says what a picture shows, by colours, contour and way, without the model.

Background: the middle colour of the border. Shape: the pixels nearer to another colour, moved into
a square and compared with the contour of every shape the scenes know, sharp and softer: a small
shape has few pixels, and a soft star without its tips is still no circle.
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
_SOFT = (0.0, 0.1, 0.2)  # of a shape's radius; much softer, a star is a circle
_FINE = 401  # pixels of a side when a contour is drawn


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
        kind: float(torch.minimum(found, like).sum() / torch.maximum(found, like).sum())
        for kind, like in _contours().items()
    }
    return max(shared, key=lambda kind: shared[kind])[0]


@cache
def _contours() -> dict[tuple[str, float], Tensor]:
    return {(shape, soft): _contour(shape, soft) for shape in SHAPES for soft in _SOFT}


def _contour(shape: str, soft: float) -> Tensor:
    """The shape, drawn large, softened, and moved into the square of the cut-outs."""
    at = torch.linspace(-1.9, 1.9, _FINE)
    inside = _softened(distance(shape, at[None, :], at[:, None], 1.0) < 0, soft * _FINE / 3.8)
    ys, xs = inside.nonzero(as_tuple=True)
    return _squared(inside[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def _softened(inside: Tensor, spread: float) -> Tensor:
    """What is more than half of the fullest after a blur of so many pixels."""
    if spread == 0.0:
        return inside
    reach = int(3 * spread)
    bell = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * spread**2))
    blurred = F.conv2d(inside.float()[None, None], bell[None, None, None], padding=(0, reach))
    blurred = F.conv2d(blurred, bell[None, None, :, None], padding=(reach, 0))[0, 0]
    return blurred > 0.5 * blurred.max()


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
