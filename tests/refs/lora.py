"""LoRA in float64, written as the formulas read. Shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_diffusion.ops import LoraDelta


def lora_merge_(weight: Tensor, deltas: Sequence[LoraDelta]) -> Tensor:
    """The merged weight before its rounding; `weight` stays as it is. Undone, it is `weight`."""
    result = weight.double()
    for delta in deltas:
        result[delta.start : delta.end] += delta.scale * (delta.up.double() @ delta.down.double())
    return result


def lora_apply(
    x: Tensor, y: Tensor, adapters: Sequence[Sequence[LoraDelta]], index: Tensor | None = None
) -> Tensor:
    result = y.double().clone()
    for row in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).reshape(
        -1, x.ndim - 1
    ):
        at = tuple(row.tolist())
        chosen = range(len(adapters))
        if index is not None:
            number = int(index[at[: index.ndim]])
            chosen = range(number, number + 1) if number >= 0 else range(0)
        for number in chosen:
            for delta in adapters[number]:
                hidden = delta.down.double() @ x[at].double()
                result[at][delta.start : delta.end] += delta.scale * (delta.up.double() @ hidden)
    return result


def random_weight(
    out: int, width: int, rank: int, ratio: float, dtype: torch.dtype, factor: torch.dtype
) -> tuple[Tensor, LoraDelta]:
    """A weight like a trained one, and an adapter whose update is `ratio` of it (rms)."""
    weight = (torch.randn(out, width) * 0.02).to(dtype)
    down, up = torch.randn(rank, width), torch.randn(out, rank)
    scale = 0.5
    up = up * (0.02 * ratio / scale / rank**0.5)
    return weight, LoraDelta(down.to(factor), up.to(factor), scale)
