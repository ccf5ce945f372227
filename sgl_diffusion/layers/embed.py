"""Embeddings: sinusoids of a timestep, patches of a video, rotary tables of a token grid."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def sinusoid(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """[...] -> [..., channels] in fp32: cosines, then sines, of falling frequencies."""
    half = channels // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float().unsqueeze(-1) * torch.exp(exponents / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def patchify(x: Tensor, patch: Grid) -> Tensor:
    """Video [B, C, T, h, w] -> patches [B, S, C*pt*ph*pw], tokens in order t, y, x."""
    b, c, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pt * ph * pw)


def unpatchify(x: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """Patches [B, S, pt*ph*pw*C], channels last, of a token grid -> video [B, C, T, h, w]."""
    t, h, w = grid
    pt, ph, pw = patch
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], -1, t * pt, h * ph, w * pw)


@functools.lru_cache(maxsize=16)
def rope_tables(
    grid: Grid, widths: Grid, device: torch.device, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, sum(widths)/2] in fp32 of the angles of each token of a grid.

    Of every head, the first widths[0] channels rotate with the position along the first axis, and
    so on. The angles are taken in fp64, where position times frequency is exact enough for any
    length. Tables are shared by all layers and steps, so a few are kept; a captured graph that
    reads one must hold it.
    """
    axes = []
    for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponents)
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        axes.append(angles.view(shape).expand(*grid, -1))
    angles = torch.cat(axes, dim=-1).flatten(0, 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)
