"""norm_modulate: y = (norm(x) * weight + bias) * (1 + scale) + shift, fp32 inside.

One program per row. A row of several blocks is read three times (mean, variance about the mean,
result); the second and third reads hit the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .rows import as_rows, dense, row_strides
from .settings import num_warps, row_blocks


@triton.jit
def _norm_modulate_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    width,
    eps,
    x_batch,
    x_token,
    scale_batch,
    scale_token,
    shift_batch,
    shift_token,
    RMS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // tokens
    s = row % tokens
    x_ptr += b * x_batch + s * x_token
    scale_ptr += b * scale_batch + s * scale_token
    shift_ptr += b * shift_batch + s * shift_token
    out_ptr += row * width
    lane = tl.arange(0, BLOCK)

    mean = 0.0
    if not RMS:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for block in tl.static_range(BLOCKS):
            at = block * BLOCK + lane
            total += tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=0) / width

    square = tl.zeros([BLOCK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        at = block * BLOCK + lane
        x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32) - mean
        square += tl.where(at < width, x * x, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(square, axis=0) / width + eps)

    for block in tl.static_range(BLOCKS):
        at = block * BLOCK + lane
        inside = at < width
        y = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        if WEIGHT:
            y *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            y *= 1.0 + tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            y += tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def norm_modulate_launch(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """x [B, S, D], or any [..., D] without scale and shift; they are [B, D] or broadcast to x."""
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = as_rows(x, scale, shift)
    scale, shift, weight, bias = (dense(part) for part in (scale, shift, weight, bias))
    width = x.shape[-1]
    block, blocks = row_blocks(width)
    # An absent tensor needs some pointer; its flag keeps the kernel from reading it.
    _norm_modulate_kernel[(out.numel() // width,)](
        x,
        x if scale is None else scale,
        x if shift is None else shift,
        x if weight is None else weight,
        x if bias is None else bias,
        out,
        x.shape[-2],
        width,
        eps,
        *row_strides(x, x),
        *row_strides(scale, x),
        *row_strides(shift, x),
        RMS=rms,
        SCALE=scale is not None,
        SHIFT=shift is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        BLOCK=block,
        BLOCKS=blocks,
        num_warps=num_warps(block),
    )
    return out
