"""Which layers the adapters of some rows reach, where, and with what room for their ranks.

Adapters of one layout can take each other's places in the tensors that a CUDA graph reads
(`slots.py`); those of another layout need another graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sgl_diffusion.ops import LoraDelta

if TYPE_CHECKING:
    from sgl_diffusion.engine.lora.rows import Blend

_LEAST_RANK = 16  # what a kernel takes at least; above it ranks are rounded up to powers of two
UP = torch.float32  # a strength is part of the factor: the product is not rounded to less

Rows = tuple[int, int]  # the first of a layer's output, and how many


@dataclass(frozen=True)
class Span:
    """Rows of a layer that adapters reach; `rank` and `dtype` are those of the lower factors."""

    start: int
    rows: int
    width: int
    rank: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of one adapter."""
        return self.rank * (self.width * self.dtype.itemsize + self.rows * UP.itemsize)


@dataclass(frozen=True)
class Layout:
    """Of so many adapters, in the order of the layers in their model."""

    adapters: int
    layers: tuple[tuple[nn.Module, tuple[Span, ...]], ...]

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # asked in every step, of hundreds of layers
        return hash((self.adapters, self.layers))

    @functools.cached_property
    def adapter_bytes(self) -> int:
        return sum(span.nbytes for _, spans in self.layers for span in spans)

    @property
    def nbytes(self) -> int:
        return self.adapters * self.adapter_bytes


class Layouts:
    """Those of blends on the layers of some models."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        modules = dict.fromkeys(module for model in models for module in model.modules())
        self._places = {module: place for place, module in enumerate(modules)}
        self._last: tuple[tuple[weakref.ref[Blend], ...], Layout] | None = None

    def of(self, blends: Iterable[Blend]) -> Layout:
        """The layout that has room for all of them, whatever their order."""
        wanted = tuple(weakref.ref(blend) for blend in blends)
        if self._last is None or self._last[0] != wanted:
            self._last = wanted, self._made([blend for ref in wanted if (blend := ref())])
        return self._last[1]

    def _made(self, blends: Sequence[Blend]) -> Layout:
        found: dict[nn.Module, dict[Rows, Span]] = {}
        for blend in blends:
            for module, deltas in blend.layers.items():
                if module not in self._places:
                    continue
                known = found.setdefault(module, {})
                for rows, some in by_rows(deltas).items():
                    span = _span(rows, some)
                    known[rows] = _wider(known[rows], span) if rows in known else span
        order = sorted(found, key=self._places.__getitem__)
        layers = tuple(
            (module, tuple(span for _, span in sorted(found[module].items()))) for module in order
        )
        return Layout(len(blends), layers)


def by_rows(deltas: Sequence[LoraDelta]) -> Mapping[Rows, list[LoraDelta]]:
    """A layer's changes by the rows that they reach. Those on the same rows are one change: their
    ranks lie side by side."""
    found: dict[Rows, list[LoraDelta]] = {}
    for delta in deltas:
        found.setdefault((delta.start, delta.up.shape[0]), []).append(delta)
    return found


def _span(rows: Rows, deltas: Sequence[LoraDelta]) -> Span:
    rank = sum(delta.down.shape[0] for delta in deltas)
    room = max(_LEAST_RANK, 1 << (rank - 1).bit_length())
    dtype = functools.reduce(torch.promote_types, (delta.down.dtype for delta in deltas))
    return Span(*rows, deltas[0].down.shape[1], room, dtype)


def _wider(a: Span, b: Span) -> Span:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return Span(a.start, a.rows, a.width, max(a.rank, b.rank), dtype)
