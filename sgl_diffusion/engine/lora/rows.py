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
from sgl_diffusion.engine.lora.fit import Fitted, Source
from sgl_diffusion.loader.adapters.types import LowRank
from sgl_diffusion.ops import LoraDelta


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
        self._blends: tuple[Blend, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._rows = 0  # of the batch under way; 0 between batches
        self._index: Tensor | None = None
        self._thread = 0  # that runs the batch; what others do beside it is no part of it

    @contextmanager
    def of(self, blends: Sequence[Blend | None]) -> Iterator[None]:
        """While it lasts, row i of a forward pass has blends[i], and so has row i + B of a pass
        over twice the rows, as guidance makes it."""
        wanted = tuple(dict.fromkeys(blend for blend in blends if blend is not None))
        if wanted != self._blends:
            self._install(wanted)
        if not wanted:
            yield
            return
        same = len(wanted) == 1 and None not in blends
        numbers = [-1 if blend is None else wanted.index(blend) for blend in blends]
        self._index = None if same else torch.tensor(numbers, device=self._device)
        self._rows, self._thread = len(blends), get_ident()
        try:
            yield
        finally:
            self._rows, self._index = 0, None

    def clear(self) -> None:
        """Let go of the layers and of the adapters."""
        self._install(())

    def _install(self, blends: tuple[Blend, ...]) -> None:
        for handle in self._handles:
            handle.remove()
        self._blends = blends
        modules = dict.fromkeys(module for blend in blends for module in blend.layers)
        self._handles = [self._hook(module, blends) for module in modules]

    def _hook(self, module: nn.Module, blends: tuple[Blend, ...]) -> RemovableHandle:
        adapters = [blend.layers.get(module, ()) for blend in blends]

        def add(_: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
            if self._rows == 0 or self._thread != get_ident():
                return y
            return ops.lora_apply_(inputs[0], y, adapters, self._index_of(inputs[0]))

        return module.register_forward_hook(add)

    def _index_of(self, x: Tensor) -> Tensor | None:
        times, rest = divmod(x.shape[0], self._rows)
        assert times > 0 and rest == 0, f"a layer got {x.shape[0]} rows of {self._rows}"
        return self._index if self._index is None or times == 1 else self._index.repeat(times)
