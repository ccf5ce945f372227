"""What a strategy is: attention whose queries and keys are spread over ranks.

Every rank has some tokens, of any number; together they have each token once, so keys are counted
once whatever their order. The result of a rank is that of its own queries over the keys of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sgl_diffusion.attention.base import AttentionBackend


@dataclass(frozen=True)
class Lengths:
    """How many queries and how many keys each rank of the group has."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


class Strategy(Protocol):
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
    ) -> Tensor:
        """q, k, v [B, S, H, d] of this rank to the result [B, S, H, d] of this rank."""


class Alone:
    """One rank has everything: the backend itself."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
    ) -> Tensor:
        return self._backend.forward(q, k, v, scale=scale)
