"""Adapters applied to single rows of a batch, from outside: the weights stay as they are.

A layer that some row's adapter reaches gets a hook that adds that adapter's part to its output.
Hooks are there only while a batch needs them: without adapters it runs as if there were none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sgl_diffusion import ops
from sgl_diffusion.engine.graphs.capture import Pass
from sgl_diffusion.engine.lora.fit import Fitted, Source
from sgl_diffusion.engine.lora.slots import Slots
from sgl_diffusion.loader.adapters.types import LowRank
from sgl_diffusion.ops import LoraDelta

Deltas = Sequence[Sequence[LoraDelta]]


@dataclass(frozen=True, eq=False)
class Blend:
    """The adapters of one job as one: what each layer gets. `key` tells blends apart."""

    key: tuple[tuple[Source, float, tuple[str, ...]], ...]
    layers: Mapping[nn.Module, tuple[LoraDelta, ...]]

    @property
    def sources(self) -> set[Source]:
        return {source for source, _, _ in self.key}


Use = tuple[Fitted, float, tuple[str, ...]]  # an adapter, its strength, the components it is for


def blend_key(uses: Sequence[Use]) -> tuple[tuple[Source, float, tuple[str, ...]], ...]:
    return tuple((fitted.source, strength, parts) for fitted, strength, parts in uses)


def make_blend(uses: Sequence[Use]) -> Blend:
    layers: dict[nn.Module, list[LoraDelta]] = {}
    for fitted, strength, components in uses:
        for component in components:
            for place in fitted.places.get(component, ()):
                delta = place.delta
                assert isinstance(delta, LowRank), "only low-rank changes are applied row by row"
                scale = strength * delta.scale
                low = LoraDelta(delta.down, delta.up, scale, place.start)
                layers.setdefault(place.module, []).append(low)
    return Blend(blend_key(uses), {module: tuple(deltas) for module, deltas in layers.items()})


class RowAdapters:
    """Puts the blends of a batch's rows on the layers for the time of a forward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: Slots | tuple[Blend, ...] = ()  # what the hooks add
        self._handles: list[RemovableHandle] = []
        self._rows = 0  # of the batch under way; 0 between batches
        self._index: Tensor | None = None
        self._indices: dict[tuple[int, ...], Tensor] = {}  # the same by the tokens of a layer
        self._thread = 0  # that runs the batch; what others do beside it is no part of it

    @contextmanager
    def of(self, blends: Sequence[Blend | None], slots: Slots | None = None) -> Iterator[None]:
        """While it lasts, row i of a forward pass has blends[i], and so has row i + B of a pass
        over twice the rows, as guidance makes it. With slots they are read from there."""
        wanted = tuple(dict.fromkeys(blend for blend in blends if blend is not None))
        if slots is not None:
            index: Tensor | None = slots.write(blends)
            self._install_slots(slots)
        else:
            self._install_blends(wanted)
            numbers = [-1 if blend is None else wanted.index(blend) for blend in blends]
            same = len(wanted) == 1 and None not in blends
            index = None if same or not wanted else torch.tensor(numbers, device=self._device)
        with self._under_way(len(blends) if wanted else 0, index):
            yield

    def through(self, slots: Slots, rows: int, run: Pass) -> Pass:
        """`run` on so many rows with what is in the slots by then."""

        def adapted(latents: Tensor, timesteps: Tensor, context: Any, expert: int) -> Tensor:
            self._install_slots(slots)
            with self._under_way(rows, slots.index(rows)):
                return run(latents, timesteps, context, expert)

        return adapted

    def clear(self) -> None:
        """Let go of the layers and of the adapters."""
        self._install((), {})

    @contextmanager
    def _under_way(self, rows: int, index: Tensor | None) -> Iterator[None]:
        before = self._rows, self._index, self._indices, self._thread
        self._rows, self._index, self._indices, self._thread = rows, index, {}, get_ident()
        try:
            yield
        finally:
            self._rows, self._index, self._indices, self._thread = before

    def _install_blends(self, blends: tuple[Blend, ...]) -> None:
        modules = dict.fromkeys(module for blend in blends for module in blend.layers)
        self._install(
            blends,
            {module: [blend.layers.get(module, ()) for blend in blends] for module in modules},
        )

    def _install_slots(self, slots: Slots) -> None:
        self._install(slots, slots.stacks)

    def _install(self, of: Slots | tuple[Blend, ...], layers: Mapping[nn.Module, Deltas]) -> None:
        if self._of == of:
            return
        for handle in self._handles:
            handle.remove()
        self._of = of
        self._handles = [self._hook(module, adapters) for module, adapters in layers.items()]

    def _hook(self, module: nn.Module, adapters: Deltas) -> RemovableHandle:
        def add(_: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
            if self._rows == 0 or self._thread != get_ident():
                return y
            return ops.lora_apply_(inputs[0], y, adapters, self._index_of(inputs[0]))

        return module.register_forward_hook(add)

    def _index_of(self, x: Tensor) -> Tensor | None:
        lead = tuple(x.shape[:-1])
        times, rest = divmod(lead[0], self._rows)
        assert times > 0 and rest == 0, f"a layer got {lead[0]} rows of {self._rows}"
        if self._index is None:
            return None
        if lead not in self._indices:
            # Once for all layers of this length, as each of them would have to do it.
            index = self._index.repeat(times).view(-1, *[1] * (len(lead) - 1))
            self._indices[lead] = index.expand(lead).contiguous()
        return self._indices[lead]
