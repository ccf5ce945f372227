"""A case: one op at one shape, the works that do it, and what it has to move or multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sgl_diffusion.bench.names import DTYPES, SIZES
from sgl_diffusion.bench.timing import Work

BYTES, FLOP = "GB/s", "GFLOP/s"
EAGER, COMPILE = "eager", "compile"


@dataclass(frozen=True)
class Bar:
    """How much faster than a peer the op must be, and should be."""

    must: float
    aim: float


@dataclass
class Case:
    """`peers` are measured beside `ours`, by name.

    `amount` is in bytes or FLOP, the least that a call needs. `copied` is copied to find what
    memory gives at this size.
    """

    ours: Work
    peers: dict[str, Work]
    amount: float
    copied: Tensor
    unit: str = BYTES
    errors: dict[str, float] = field(default_factory=dict)  # of "ours" and of peers
    bars: dict[str, Bar] = field(default_factory=dict)
    implementation: str = ""  # of `ours`, where it is not the dispatch that chooses
    after_copy: bool = False  # ours begins with a copy of `copied`, which is no part of the op
    extra: dict[str, float] = field(default_factory=dict)  # more figures for the row


Build = Callable[["Place", tuple[int, ...]], Case]


@dataclass(frozen=True)
class Place:
    """Where tensors of a case live."""

    device: str
    dtype: torch.dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """Gates, scales and angles are fp32 in every model."""
        return self.normal(*shape, dtype=torch.float32)


@dataclass(frozen=True)
class Spec:
    """How the cases of an op are made, and which are measured unless others are asked for."""

    op: str
    build: Build
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ("bf16",)

    def __post_init__(self) -> None:
        assert all(len(shape) == len(SIZES[self.op]) for shape in self.shapes), self.op
        assert set(self.dtypes) <= set(DTYPES), self.op


def wide(x: Tensor) -> Tensor:
    """fp32, where a chain computes in it; float64 for the exact result of the same chain."""
    return x if x.dtype == torch.float64 else x.float()


def error_of(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())
