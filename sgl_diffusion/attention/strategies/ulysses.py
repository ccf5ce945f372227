"""Ulysses (arXiv 2309.14509): each rank takes some heads of all tokens for the time of attention.

Queries, keys and values travel in one exchange, the results in a second one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion.attention.strategies.base import Lengths, Strategy
from sgl_diffusion.distributed.group import Group
from sgl_diffusion.distributed.shares import shares


class Ulysses:
    """`inner` attends over what a group of ranks has together: one group, or several in a ring.

    The lengths it gets count all tokens of each group. Ranks have equally many heads, or one more.
    """

    def __init__(self, group: Group, inner: Strategy) -> None:
        self._group = group
        self._inner = inner

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
    ) -> Tensor:
        ranks = self._group.size
        ring = len(lengths.queries) // ranks
        sums = Lengths(_sums(lengths.queries, ring), _sums(lengths.keys, ring))
        # The ranks of this group stand next to each other; which group it is, their ranks say.
        first = self._group.ranks[0] // ranks % ring * ranks
        mine = slice(first, first + ranks)
        queries, keys = lengths.queries[mine], lengths.keys[mine]
        heads = shares(q.shape[2], ranks)
        whole = self._by_heads((q, k, v), (queries, keys, keys), heads)
        out = self._inner.attend(*whole, sums, scale)
        return self._by_tokens(out, queries, heads)

    def _by_heads(
        self,
        tensors: tuple[Tensor, ...],
        lengths: tuple[tuple[int, ...], ...],
        heads: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S of this rank, H, d] each to [B, S of the group, heads of this rank, d]."""
        ranks, share = self._group.size, heads[self._group.index]
        batch, _, _, dim = tensors[0].shape
        split = [x.split(list(heads), 2) for x in tensors]
        parts = [torch.cat([x[to].flatten() for x in split]) for to in range(ranks)]
        shapes = [[(batch, n, share, dim) for n in each] for each in zip(*lengths, strict=True)]
        sizes = [[batch * n * share * dim for n in each] for each in zip(*lengths, strict=True)]
        received = self._group.exchange(parts, [sum(each) for each in sizes])
        pieces = [
            [piece.view(shape) for piece, shape in zip(data.split(size), shape_, strict=True)]
            for data, size, shape_ in zip(received, sizes, shapes, strict=True)
        ]
        q, k, v = (torch.cat(each, 1) for each in zip(*pieces, strict=True))
        return q, k, v

    def _by_tokens(self, x: Tensor, lengths: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
        """[B, S of the group, heads of this rank, d] to [B, S of this rank, H, d]."""
        batch, _, _, dim = x.shape
        mine = lengths[self._group.index]
        parts = [part.flatten() for part in x.split(list(lengths), 1)]
        received = self._group.exchange(parts, [batch * mine * n * dim for n in heads])
        pieces = zip(received, heads, strict=True)
        return torch.cat([data.view(batch, mine, n, dim) for data, n in pieces], 2)


def _sums(lengths: tuple[int, ...], groups: int) -> tuple[int, ...]:
    each = len(lengths) // groups
    return tuple(sum(lengths[start : start + each]) for start in range(0, len(lengths), each))
