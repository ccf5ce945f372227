"""What the row kernels share on the host: strides of tensors that broadcast over rows."""

from __future__ import annotations

from torch import Tensor


def row_strides(part: Tensor | None, x: Tensor) -> tuple[int, int]:
    """(batch, token) strides of a tensor that broadcasts over the rows of x; 0 repeats a row."""
    if part is None or part.ndim == 1:
        return 0, 0
    if part.ndim == 2 and x.ndim == 3:
        return (part.stride(0) if part.shape[0] > 1 else 0), 0
    token = part.stride(-2) if part.shape[-2] > 1 else 0
    return (part.stride(0) if part.ndim == 3 and part.shape[0] > 1 else 0), token


def dense(part: Tensor | None) -> Tensor | None:
    """The tensor with a dense last dimension, copied only if it must be."""
    return part if part is None or part.stride(-1) == 1 else part.contiguous()


def as_rows(x: Tensor, *modulation: Tensor | None) -> Tensor:
    """x as [S, D] or [B, S, D] with a dense last dimension; only those take a modulation."""
    if x.ndim not in (2, 3):
        assert all(part is None for part in modulation), "modulation needs [S, D] or [B, S, D]"
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
