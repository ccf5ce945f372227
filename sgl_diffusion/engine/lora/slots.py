"""Adapters of single requests in tensors that stay where they are, as a CUDA graph reads them.

What differs between adapters of one layout is copied in: factors, strengths, which row has which.
An adapter that is there already is not copied again.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.lora.layout import UP, Layout, Span, by_rows
from sgl_diffusion.ops import LoraPart, LoraStack

if TYPE_CHECKING:
    from sgl_diffusion.engine.lora.rows import Blend


class Slots:
    """The tensors of a layout. Ranks that an adapter does not have are zeros."""

    def __init__(self, layout: Layout, device: torch.device, counters: Counters) -> None:
        self.layout = layout
        self._device = device
        self._counters = counters
        self.stacks: dict[nn.Module, LoraStack] = {
            module: LoraStack([_part(span, layout.adapters, device) for span in spans])
            for module, spans in layout.layers
        }
        # Weak: what stays here is a copy, which is good for as long as the blend is the same.
        self._held: list[weakref.ref[Blend] | None] = [None] * layout.adapters
        parts = sum(len(spans) for _, spans in layout.layers)
        self._ranks = [[0] * parts for _ in self._held]  # that are filled
        self._rows: dict[int, tuple[Tensor, list[int]]] = {}

    def index(self, rows: int) -> Tensor:
        """The tensor that says which adapter each of so many rows has, or -1."""
        return self._index(rows)[0]

    @torch.inference_mode()
    def write(self, blends: Sequence[Blend | None]) -> Tensor:
        """Have the adapters of these rows here; gives `index` of them."""
        wanted = dict.fromkeys(blend for blend in blends if blend is not None)
        held = [None if ref is None else ref() for ref in self._held]
        free = [n for n, blend in enumerate(held) if blend is None or blend not in wanted]
        for blend in wanted:
            if blend not in held:
                self._copy(free.pop(0), blend)
        places = {ref() if ref else None: n for n, ref in enumerate(self._held)}
        numbers = [-1 if blend is None else places[blend] for blend in blends]
        index, known = self._index(len(blends))
        if numbers != known:
            values = torch.tensor(numbers, dtype=index.dtype)
            if self._device.type == "cuda":
                values = values.pin_memory()
            index.copy_(values, non_blocking=True)
            known[:] = numbers
        return index

    def _index(self, rows: int) -> tuple[Tensor, list[int]]:
        if rows not in self._rows:
            none = torch.full((rows,), -1, dtype=torch.int32, device=self._device)
            self._rows[rows] = none, [-1] * rows
        return self._rows[rows]

    def _copy(self, place: int, blend: Blend) -> None:
        to: list[Tensor] = []
        given: list[Tensor] = []
        ups: list[Tensor] = []
        scales: list[float] = []
        left: list[Tensor] = []  # of the adapter before it
        ranks: list[int] = []
        for module, spans in self.layout.layers:
            changes = by_rows(blend.layers.get(module, ()))
            for span, part in zip(spans, self.stacks[module].parts, strict=True):
                down, up, rank = part.down[place], part.up[place], 0
                for delta in changes.get((span.start, span.rows), ()):
                    own = slice(rank, rank + delta.down.shape[0])
                    to += [down[own], up[:, own]]
                    given += [delta.down, delta.up]
                    ups.append(up[:, own])
                    scales.append(float(delta.scale))
                    rank = own.stop
                before = slice(rank, self._ranks[place][len(ranks)])
                if before.stop > rank:
                    left += [down[before], up[:, before]]
                ranks.append(rank)
        # Until all of it is here, whatever becomes of it.
        self._held[place] = None
        self._ranks[place] = list(map(max, self._ranks[place], ranks))
        if to:
            torch._foreach_copy_(to, given)
            torch._foreach_mul_(ups, scales)
        if left:
            torch._foreach_zero_(left)
        self._held[place], self._ranks[place] = weakref.ref(blend), ranks
        self._counters.add("graph_adapter_copies_total")


def _part(span: Span, adapters: int, device: torch.device) -> LoraPart:
    down = torch.zeros(adapters, span.rank, span.width, dtype=span.dtype, device=device)
    up = torch.zeros(adapters, span.rows, span.rank, dtype=UP, device=device)
    return LoraPart(down, up, span.start)
