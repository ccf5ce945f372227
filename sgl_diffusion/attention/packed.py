"""Rows of different lengths as one sequence: how backends attend within each of them.

q [N, H, d], k and v [M, H, d]: the tokens of all rows, one row after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLengths:
    """How many queries and how many keys each row has."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the queries and where the keys of each row begin, and the last ones end."""
        return _bounds(self.queries, device), _bounds(self.keys, device)


@functools.lru_cache(maxsize=256)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [rows + 1]; kept, so that no layer waits for the device to get them once more."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def one_by_one(
    forward: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: RowLengths,
    scale: float | None,
) -> Tensor:
    """Each row by itself, where a backend knows no rows of different lengths."""
    queries, keys = list(lengths.queries), list(lengths.keys)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([forward(*(x[None] for x in part), scale=scale)[0] for part in parts])
