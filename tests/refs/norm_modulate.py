"""norm_modulate in float64, written as the formula reads. Shared by tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def _rows(modulation: Tensor, x: Tensor) -> Tensor:
    if modulation.ndim == 2 and x.ndim == 3:
        modulation = modulation[:, None, :]
    return modulation.double().expand(x.shape)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "layer",
) -> Tensor:
    y = x.double()
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    if scale is not None:
        y = y * (1.0 + _rows(scale, x))
    if shift is not None:
        y = y + _rows(shift, x)
    return y


def rounding_error(got: Tensor, want: Tensor) -> tuple[float, float]:
    """RMS error of a result, and the one that rounding the exact value once would make."""
    ideal = (want.to(got.dtype).double() - want).square().mean().sqrt().item()
    return (got.double() - want).square().mean().sqrt().item(), ideal
