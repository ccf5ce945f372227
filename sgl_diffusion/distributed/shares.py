"""Sharing out a sequence: contiguous parts whose lengths differ by at most one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.distributed.group import Group


def shares(length: int, ranks: int) -> tuple[int, ...]:
    """How many of `length` tokens each rank gets."""
    each, more = divmod(length, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def span(length: int, ranks: int, rank: int) -> slice:
    """Which tokens those are."""
    parts = shares(length, ranks)
    start = sum(parts[:rank])
    return slice(start, start + parts[rank])


def overlap(part: slice, within: slice) -> slice:
    """The tokens of `part` that lie in `within`, counted from the beginning of `within`."""
    start, stop = (min(max(at, within.start), within.stop) for at in (part.start, part.stop))
    return slice(start - within.start, stop - within.start)


@dataclass(frozen=True)
class Shares:
    """A sequence of several segments (text, image), each shared out by itself.

    Every rank has a part of every segment, so no token is on two ranks and none is a duplicate.
    """

    segments: tuple[int, ...]
    group: Group

    @property
    def possible(self) -> bool:
        """Whether there is a token of every segment for every rank."""
        return all(length >= self.group.size for length in self.segments)

    def span(self, segment: int) -> slice:
        return span(self.segments[segment], self.group.size, self.group.index)

    def lengths(self, *segments: int) -> tuple[int, ...]:
        """How many tokens of these segments each rank has."""
        each = [shares(self.segments[segment], self.group.size) for segment in segments]
        return tuple(map(sum, zip(*each, strict=True)))

    def cut(self, x: Tensor, *segments: int, dim: int = 1) -> Tensor:
        """This rank's part of whole segments that follow each other along `dim`."""
        whole = x.split([self.segments[segment] for segment in segments], dim)
        parts = [
            part.narrow(dim, (at := self.span(segment)).start, at.stop - at.start)
            for segment, part in zip(segments, whole, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, x: Tensor, *segments: int) -> Tensor:
        """The whole segments [B, S, ...] again, on every rank."""
        ranks = self.group.gather(x, self.lengths(*segments))
        each = [shares(self.segments[segment], self.group.size) for segment in segments]
        parts = [
            part.split(sizes, 1) for part, sizes in zip(ranks, zip(*each, strict=True), strict=True)
        ]
        whole = [part for segment in zip(*parts, strict=True) for part in segment]
        return torch.cat(whole, 1)
