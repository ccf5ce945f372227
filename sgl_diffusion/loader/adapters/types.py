"""An adapter in memory: which change each layer of a model gets, whatever file it came from.

Names are those of the diffusers model classes: a component (`transformer`, `text_encoder`), a
module of it (`blocks.0.attn1.to_q`) and a parameter of that module, mostly `weight`. A weight of a
convolution counts as a matrix [out, in * kernel]. `delta` is the change in fp32 at a strength.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

TRANSFORMER, TRANSFORMER_2 = "transformer", "transformer_2"


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale * up @ down`; down [rank, in], up [out, rank]; scale is alpha / rank, or 1."""

    kind: ClassVar[str] = "low rank"
    per_request: ClassVar[bool] = True
    parameter: ClassVar[str] = "weight"

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def delta(self, base: Tensor | None = None, strength: float = 1.0) -> Tensor:
        return (strength * self.scale) * (self.up.float() @ self.down.float())

    def rows(self, start: int, stop: int) -> LowRank:
        return replace(self, up=self.up[start:stop])


@dataclass(frozen=True, eq=False)
class FullDelta:
    """`scale * value`, added to a weight, a bias or any other parameter of a module."""

    kind: ClassVar[str] = "full"
    per_request: ClassVar[bool] = False

    value: Tensor
    parameter: str = "weight"
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def rank(self) -> int:
        return 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)

    def delta(self, base: Tensor | None = None, strength: float = 1.0) -> Tensor:
        return (strength * self.scale) * self.value.float()

    def rows(self, start: int, stop: int) -> FullDelta:
        return replace(self, value=self.value[start:stop])


@dataclass(frozen=True, eq=False)
class Hada:
    """LoHa: `scale * (w1_a @ w1_b) * (w2_a @ w2_b)`; a [out, rank], b [rank, in]."""

    kind: ClassVar[str] = "LoHa"
    per_request: ClassVar[bool] = False
    parameter: ClassVar[str] = "weight"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.w1_a, self.w1_b, self.w2_a, self.w2_b

    def delta(self, base: Tensor | None = None, strength: float = 1.0) -> Tensor:
        first = self.w1_a.float() @ self.w1_b.float()
        return (strength * self.scale) * (first * (self.w2_a.float() @ self.w2_b.float()))

    def rows(self, start: int, stop: int) -> Hada:
        return replace(self, w1_a=self.w1_a[start:stop], w2_a=self.w2_a[start:stop])


@dataclass(frozen=True, eq=False)
class Kron:
    """LoKr: `scale * kron(w1, w2)`, where w1 and w2 are each a matrix or a pair (a, b) of factors.

    `window` holds the rows that are meant, where a fused layer was split.
    """

    kind: ClassVar[str] = "LoKr"
    per_request: ClassVar[bool] = False
    parameter: ClassVar[str] = "weight"

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0
    window: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        (out_1, in_1), (out_2, in_2) = (
            (factors[0].shape[0], factors[-1].shape[1]) for factors in (self.w1, self.w2)
        )
        start, stop = self.window or (0, out_1 * out_2)
        return stop - start, in_1 * in_2

    @property
    def rank(self) -> int:
        """Of the factors; 0 where both are whole matrices."""
        return max((f[0].shape[1] for f in (self.w1, self.w2) if len(f) == 2), default=0)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.w1, *self.w2

    def delta(self, base: Tensor | None = None, strength: float = 1.0) -> Tensor:
        first, second = (
            factors[0].float() if len(factors) == 1 else factors[0].float() @ factors[1].float()
            for factors in (self.w1, self.w2)
        )
        whole = torch.kron(first, second)
        rows = whole if self.window is None else whole[slice(*self.window)]
        return (strength * self.scale) * rows

    def rows(self, start: int, stop: int) -> Kron:
        first = self.window[0] if self.window else 0
        return replace(self, window=(first + start, first + stop))


@dataclass(frozen=True, eq=False)
class Dora:
    """DoRA: `base + strength * change`, each row with the length that `magnitude` [out, 1] says.

    A magnitude [1, in] says the lengths of the columns; such a layer has no segments of rows.
    """

    kind: ClassVar[str] = "DoRA"
    per_request: ClassVar[bool] = False
    parameter: ClassVar[str] = "weight"

    change: LowRank | FullDelta | Hada | Kron
    magnitude: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.change.shape

    @property
    def rank(self) -> int:
        return self.change.rank

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.change.tensors, self.magnitude

    def delta(self, base: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """The change of `base`, which is needed here. It is not linear in the strength."""
        assert base is not None, "DoRA is relative to the weight it changes"
        old = base.float().flatten(1)
        new = old + self.change.delta(strength=strength)
        length = torch.linalg.vector_norm(new, dim=0 if self.by_column else 1, keepdim=True)
        # A row of zeros has no direction, and stays one.
        return new * (self.magnitude.float() / torch.where(length == 0, 1.0, length)) - old

    @property
    def by_column(self) -> bool:
        return self.magnitude.shape[0] == 1 < self.shape[0]

    def rows(self, start: int, stop: int) -> Dora:
        assert not self.by_column, "the length of a column is that of all its rows"
        return Dora(self.change.rows(start, stop), self.magnitude[start:stop])


Delta = LowRank | FullDelta | Hada | Kron | Dora
Modules = Mapping[str, tuple[Delta, ...]]


@dataclass(frozen=True, eq=False)
class Adapter:
    """What one file (or a pair of files, one per expert) changes.

    Several changes of one module are of different parameters, or are added up. `alpha` is the one
    alpha of all layers, None where there is none or they differ. `unmatched` are keys of the file
    that name no layer of the family.
    """

    format: str
    path: str
    components: Mapping[str, Modules]
    alpha: float | None = None
    unmatched: tuple[str, ...] = ()

    def deltas(self) -> Iterator[Delta]:
        for modules in self.components.values():
            for deltas in modules.values():
                yield from deltas

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, in rising order."""
        return tuple(sorted({delta.rank for delta in self.deltas() if delta.rank}))

    @property
    def rank(self) -> int:
        """The largest rank; 0 where the file holds full weights only."""
        return max(self.ranks, default=0)

    @property
    def layers(self) -> int:
        return sum(len(modules) for modules in self.components.values())

    @property
    def nbytes(self) -> int:
        storages = (t.untyped_storage() for delta in self.deltas() for t in delta.tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({delta.kind for delta in self.deltas()}))

    @property
    def per_request(self) -> bool:
        """Whether it can be applied to some rows of a batch; otherwise it can only be merged."""
        return all(delta.per_request for delta in self.deltas())

    def of(self, component: str) -> Modules:
        """The changes of a component. One file for a model with two experts is meant for both,
        unless it tells them apart."""
        if component == TRANSFORMER_2 and component not in self.components:
            return self.components.get(TRANSFORMER, {})
        return self.components.get(component, {})
