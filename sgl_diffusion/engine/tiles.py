"""Decoding in tiles that overlap: less memory at a time, and of several ranks each has its share.

A tile does not see what is beyond its edges, so the frames differ a little from those that are
decoded whole; where two overlap, one fades into the other. Ranks change nothing of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.distributed.group import Group

Decode = Callable[[Tensor], Iterator[Tensor]]  # latents [1, C, T, h, w] to frames [f, H, W, 3]

_OVERLAP = 4  # a quarter of a tile
_LEAST = 4  # latents along the edge of a tile
_ALONE = Group((0,), 0)


@dataclass(frozen=True)
class Span:
    """Of latents along one edge; it fades where it overlaps the one before or behind it."""

    start: int
    stop: int
    before: int
    behind: int

    def weights(self, pixels: int) -> Tensor:
        """Of each pixel, from nearly 0 to 1 and back."""
        length = (self.stop - self.start) * pixels
        at = torch.arange(length, dtype=torch.float32) + 0.5
        rise = at / max(self.before * pixels, 0.5)
        fall = (length - at) / max(self.behind * pixels, 0.5)
        return torch.minimum(rise, fall).clamp(max=1.0)


def spans(length: int, tile: int) -> list[Span]:
    """Tiles of one size that cover an edge; each overlaps the next by a quarter at least."""
    if length <= tile:
        return [Span(0, length, 0, 0)]
    count = -(-(length - tile) // (tile - tile // _OVERLAP)) + 1
    starts = [(length - tile) * number // (count - 1) for number in range(count)]
    overlaps = [0, *(one + tile - other for one, other in zip(starts, starts[1:], strict=False)), 0]
    return [
        Span(start, start + tile, before, behind)
        for start, before, behind in zip(starts, overlaps, overlaps[1:], strict=False)
    ]


class Tiles:
    """`edge` is that of a tile, in pixels. On several ranks all decode the same at a time."""

    def __init__(self, decode: Decode, edge: int, group: Group = _ALONE) -> None:
        self._decode = decode
        self._edge = edge
        self._group = group

    @property
    def shared(self) -> bool:
        return self._group.size > 1

    def decode(self, latents: Tensor, height: int) -> Iterator[Tensor]:
        """Frames of this height, in the chunks that the VAE makes, on the host."""
        pixels = height // latents.shape[3]
        tile = max(self._edge // pixels, _LEAST)
        down, across = (spans(length, tile) for length in latents.shape[3:])
        grid = [(y, x) for y in down for x in across]
        if len(grid) == 1 and not self.shared:
            yield from self._decode(latents)
            return
        places = self._places(len(grid))
        parts = []
        for place in places:
            y, x = grid[place]
            parts.append(self._decode(latents[..., y.start : y.stop, x.start : x.stop]))
        size = height, latents.shape[4] * pixels
        for chunks in zip(*parts, strict=True):
            own = torch.stack([chunk.cpu() for chunk in chunks])
            decoded = self._joined(own, len(grid))
            yield _blended(decoded, grid, pixels, size)

    def _places(self, tiles: int) -> list[int]:
        """Which tiles this rank decodes: where there are too few, one that another has, too."""
        own = list(range(self._group.index, tiles, self._group.size))
        return own or [self._group.index % tiles]

    def _joined(self, own: Tensor, tiles: int) -> list[Tensor]:
        """The tiles of all ranks, in order."""
        size = self._group.size
        counts = [max(1, len(range(rank, tiles, size))) for rank in range(size)]
        ranks = self._group.gather(own.unsqueeze(0), counts)
        return [ranks[tile % size][0, tile // size] for tile in range(tiles)]


def _blended(
    tiles: list[Tensor], grid: list[tuple[Span, Span]], pixels: int, size: tuple[int, int]
) -> Tensor:
    frames = torch.zeros(len(tiles[0]), *size, 3)
    total = torch.zeros(*size, 1)
    for tile, (y, x) in zip(tiles, grid, strict=True):
        weights = (y.weights(pixels)[:, None] * x.weights(pixels)[None, :])[..., None]
        rows = slice(y.start * pixels, y.stop * pixels)
        columns = slice(x.start * pixels, x.stop * pixels)
        frames[:, rows, columns] += weights * tile
        total[rows, columns] += weights
    return (frames / total).round().to(torch.uint8)
