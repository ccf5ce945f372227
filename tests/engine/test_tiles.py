"""Decoding in tiles: what they cover, and how they meet."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sgl_diffusion.engine.tiles import Tiles, spans
from tests.recipes.parity import opened

PIXELS = 8


def local(latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """As if a VAE looked at single latents only: a chunk of one frame, then of two for each."""
    for number, latent in enumerate(latents[0, :3].unbind(1)):
        frames = latent.permute(1, 2, 0).repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
        yield frames.to(torch.uint8).expand(1 if number == 0 else 2, -1, -1, -1)


def drawn(down: int, across: int, frames: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 4, frames, down, across), generator=generator).float()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 13, 14, 15, 40, 1000])
def test_tiles_cover_everything_with_overlaps(length: int) -> None:
    tiles = spans(length, 8)
    assert tiles[0].start == 0 and tiles[-1].stop == length
    assert {tile.stop - tile.start for tile in tiles} == {min(length, 8)}
    for one, other in pairwise(tiles):
        assert one.stop - other.start == one.behind == other.before >= 2
    assert tiles[0].before == tiles[-1].behind == 0
    total = torch.zeros(length * PIXELS)
    for tile in tiles:
        weights = tile.weights(PIXELS)
        assert 0 < weights.min() and weights.max() <= 1
        total[tile.start * PIXELS : tile.stop * PIXELS] += weights
    assert total.min() > 0


@pytest.mark.parametrize("size", [(8, 8), (9, 30), (21, 5), (3, 3)])
def test_what_looks_at_no_neighbours_is_the_same_in_tiles(size: tuple[int, int]) -> None:
    latents, seen = drawn(*size), []

    def watched(part: torch.Tensor) -> Iterator[torch.Tensor]:
        seen.append(part.shape[3:])
        return local(part)

    tiled = list(Tiles(watched, 8 * PIXELS).decode(latents, size[0] * PIXELS))
    for ours, theirs in zip(tiled, local(latents), strict=True):
        assert torch.equal(ours, theirs)
    assert max(max(shape) for shape in seen) <= 8
    assert (len(seen) > 1) == (max(size) > 8)


def test_one_tile_fades_into_the_other() -> None:
    """A tile that knows its place by its colour: no step where they meet."""
    colours = iter((0, 200))

    def flat(part: torch.Tensor) -> Iterator[torch.Tensor]:
        shape = (1, part.shape[3] * PIXELS, part.shape[4] * PIXELS, 3)
        yield torch.full(shape, next(colours), dtype=torch.uint8)

    (frame,) = Tiles(flat, 8 * PIXELS).decode(drawn(8, 14), 8 * PIXELS)
    row = frame[0, 0, :, 0].int()
    assert row[0] == 0 and row[-1] == 200
    assert (row.diff() >= 0).all() and row.diff().max() <= 200 / (2 * PIXELS) + 1


def test_a_real_vae_makes_nearly_the_same_of_tiles(tiny_wan_a: Path) -> None:
    pipeline = opened(tiny_wan_a)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, 2, 20, 12, generator=generator)
    whole = torch.cat(list(pipeline.decode(latents))).int()
    height = whole.shape[1]
    tiled = torch.cat(list(Tiles(pipeline.decode, 8 * height // 20).decode(latents, height))).int()
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().float().mean() < 0.1 * whole.float().std()
