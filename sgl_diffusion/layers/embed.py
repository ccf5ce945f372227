"""Embeddings: sinusoids of a timestep, patches of a video, rotary tables of a token grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def sinusoid(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """[...] -> [..., channels] in fp32: cosines, then sines, of falling frequencies."""
    half = channels // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float().unsqueeze(-1) * torch.exp(exponents / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


Order = Literal["first", "last"]


def patchify(x: Tensor, patch: Grid, channels: Order = "first") -> Tensor:
    """Video [B, C, T, h, w] -> patches, tokens in order t, y, x.

    A patch [B, S, ...] is C*pt*ph*pw with the channels first, or pt*ph*pw*C with them last.
    """
    b, c, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    axes = (0, 2, 4, 6, 1, 3, 5, 7) if channels == "first" else (0, 2, 4, 6, 3, 5, 7, 1)
    return x.permute(axes).reshape(b, -1, c * pt * ph * pw)


def unpatchify(x: Tensor, grid: Grid, patch: Grid, channels: Order = "last") -> Tensor:
    """Patches of a token grid -> video [B, C, T, h, w]; `channels` as for `patchify`."""
    t, h, w = grid
    pt, ph, pw = patch
    if channels == "first":
        x = x.reshape(x.shape[0], t, h, w, -1, pt, ph, pw)
        x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)
    else:
        x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(x.shape[0], -1, t * pt, h * ph, w * pw)


def token_grid(latents: Tensor, patch: Grid) -> Grid:
    """How many tokens latents [B, C, T, h, w] have along each axis."""
    t, h, w = (size // edge for size, edge in zip(latents.shape[2:], patch, strict=True))
    assert latents.shape[2:] == (t * patch[0], h * patch[1], w * patch[2]), (
        f"latents {tuple(latents.shape)} do not divide into patches {patch}"
    )
    return t, h, w


_held: ContextVar[list[Tensor] | None] = ContextVar("tables in use", default=None)


@contextmanager
def holding_tables() -> Iterator[list[Tensor]]:
    """Collects the rotary tables that are asked for meanwhile."""
    held: list[Tensor] = []
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


def rope_tables(
    grid: tuple[int, ...],
    widths: tuple[int, ...],
    device: torch.device,
    theta: float = 10_000.0,
    origin: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, sum(widths)/2] in fp32 of the angles of each token of a grid.

    Of every head, the first widths[0] channels rotate with the position along the first axis, and
    so on; positions count from `origin`, or from zero. The angles are taken in fp64, where position
    times frequency is exact enough for any length. Tables are shared by all layers and steps, so
    some are kept; a captured graph that reads one must hold it (`holding_tables`).
    """
    tables = _tables(grid, widths, device, theta, origin)
    held = _held.get()
    if held is not None:
        held.extend(tables)
    return tables


@functools.lru_cache(maxsize=64)
def _tables(
    grid: tuple[int, ...],
    widths: tuple[int, ...],
    device: torch.device,
    theta: float,
    origin: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    axes = []
    starts = origin or (0,) * len(grid)
    for axis, (length, width, start) in enumerate(zip(grid, widths, starts, strict=True)):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        positions = torch.arange(start, start + length, dtype=torch.float64)
        angles = torch.outer(positions, theta**-exponents)
        shape = [1] * len(grid) + [width // 2]
        shape[axis] = length
        axes.append(angles.view(shape).expand(*grid, -1))
    angles = torch.cat(axes, dim=-1).flatten(0, len(grid) - 1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def forget_tables() -> None:
    """Of rotation: those that are kept."""
    _tables.cache_clear()


def rope_at(
    positions: Tensor, widths: tuple[int, ...], device: torch.device, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """As `rope_tables`, for tokens [S, axes] that stand anywhere."""
    axes = []
    for axis, width in enumerate(widths):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        axes.append(torch.outer(positions[:, axis].double(), theta**-exponents))
    angles = torch.cat(axes, dim=-1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


Rope = tuple[Tensor, Tensor]


def join_ropes(*parts: Rope) -> Rope:
    """The tables of token sequences that follow each other."""
    cos, sin = zip(*parts, strict=True)
    return torch.cat(cos), torch.cat(sin)
