"""Rows of different sizes as one sequence [1, N, ...] without padding.

To whatever works on each token alone it is a batch of one long row. What is one vector for each row
is repeated for its tokens, and attention is told where rows begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sgl_diffusion.attention import Attend, AttendRepeated, AttentionContext, RowLengths


def per_token(x: Tensor, rows: Tensor | None) -> Tensor:
    """One for each row [B, ...] to one for each token [1, N, ...]; rows that are a batch stay."""
    return x if rows is None else x[rows][None]


class Packing:
    """`kinds[s][i]` tokens of kind s has row i. In the sequence stand all tokens of the first kind,
    row by row, then those of the next."""

    def __init__(self, device: torch.device, *kinds: Sequence[int]) -> None:
        self._device = device
        self.kinds = tuple(tuple(lengths) for lengths in kinds)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the rows, all kinds together."""
        return tuple(sum(row) for row in zip(*self.kinds, strict=True))

    @cached_property
    def rows(self) -> Tensor:
        """[N], whose row each token is."""
        counts = torch.tensor([length for lengths in self.kinds for length in lengths])
        row = torch.arange(len(self.kinds[0])).repeat(len(self.kinds))
        return row.repeat_interleave(counts).to(self._device)

    @cached_property
    def order(self) -> Tensor:
        """[N], which tokens there are of the first row, then of the next, and so on."""
        return torch.argsort(self.rows, stable=True)

    @cached_property
    def places(self) -> Tensor:
        """[N], where in that order each token is."""
        return torch.argsort(self.order)

    def spread(self, x: Tensor) -> Tensor:
        """One for each row [B, ...] to one for each token [1, N, ...]."""
        return per_token(x, self.rows)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """A sequence [1, N, ...] of one kind as its rows [1, L, ...]."""
        return x.split(list(self.lengths), dim=1)

    def among(self, attention: AttentionContext) -> Attend:
        """Attention of each row's tokens among themselves."""
        attend = self._attend(attention, self.lengths)
        if len(self.kinds) == 1:
            return attend

        def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
            by_row = (x[:, self.order] for x in (q, k, v))
            return attend(*by_row, scale=scale)[:, self.places]

        return run

    def from_first(self, attention: AttentionContext) -> Attend:
        """Attention of each row's tokens of the first kind to all of its tokens."""
        attend = self._attend(attention, self.lengths, self.kinds[0])

        def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
            return attend(q, k[:, self.order], v[:, self.order], scale=scale)

        return run

    def to(self, keys: Sequence[int], attention: AttentionContext) -> Attend:
        """Attention of each row's tokens to keys of its own, of which row i has keys[i]."""
        assert len(self.kinds) == 1, "tokens of one kind, row by row"
        return self._attend(attention, tuple(keys))

    def to_repeated(self, attention: AttentionContext) -> AttendRepeated | None:
        """The same with keys that stand for several, of which each row has as many."""
        assert len(self.kinds) == 1, "tokens of one kind, row by row"
        repeated = attention.repeated
        if repeated is None:
            return None

        def run(
            q: Tensor, k: Tensor, v: Tensor, repeats: Tensor, *, scale: float | None = None
        ) -> Tensor:
            count = len(repeats)
            keys, values = k.chunk(count, dim=1), v.chunk(count, dim=1)
            rows = zip(self.split(q), keys, values, repeats.split(1), strict=True)
            return torch.cat([repeated(*row, scale=scale) for row in rows], dim=1)

        return run

    def _attend(
        self, attention: AttentionContext, keys: tuple[int, ...], queries: tuple[int, ...] = ()
    ) -> Attend:
        packed = attention.packed
        assert packed is not None, "rows of different sizes are for one rank"
        lengths = RowLengths(queries or self.lengths, keys)

        def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
            return packed(q[0], k[0], v[0], lengths, scale=scale)[None]

        return run
