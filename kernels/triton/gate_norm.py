"""gate_residual_norm_modulate: h = x + y * gate and norm_modulate(h), both results, one pass.

One program per row. h is rounded to x's dtype before it is normalised, so that the second result is
exactly that of the two ops after each other. The row stays in registers between the passes.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from .rows import as_rows, dense, row_strides
from .settings import held_blocks, num_warps


@triton.jit
def _gate_residual_norm_modulate_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    tokens,
    width,
    eps,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    gate_token,
    scale_batch,
    scale_token,
    shift_batch,
    shift_token,
    RMS: tl.constexpr,
    GATE: tl.constexpr,
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
    y_ptr += b * y_batch + s * y_token
    gate_ptr += b * gate_batch + s * gate_token
    scale_ptr += b * scale_batch + s * scale_token
    shift_ptr += b * shift_batch + s * shift_token
    sum_ptr += row * width
    out_ptr += row * width
    lane = tl.arange(0, BLOCK)

    held = ()  # the row, in registers
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        at = block * BLOCK + lane
        inside = at < width
        h = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            h *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        h = rounded.to(tl.float32)
        total += h
        held = held + (h,)
    mean = 0.0
    if not RMS:
        mean = tl.sum(total, axis=0) / width

    square = tl.zeros([BLOCK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        h = held[block] - mean
        square += tl.where(block * BLOCK + lane < width, h * h, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(square, axis=0) / width + eps)

    for block in tl.static_range(BLOCKS):
        at = block * BLOCK + lane
        inside = at < width
        h = (held[block] - mean) * rstd
        if WEIGHT:
            h *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            h += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            h *= 1.0 + tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            h += tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


def gate_residual_norm_modulate_launch(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual: Tensor,
    out: Tensor,
) -> None:
    """Both results are contiguous; `residual` may be x or y. Shapes as in norm_modulate."""
    if out.numel() == 0:
        return
    x, y = as_rows(x, gate, scale, shift), as_rows(y, gate)
    gate, scale, shift, weight, bias = (dense(part) for part in (gate, scale, shift, weight, bias))
    width = x.shape[-1]
    block, blocks = held_blocks(width)
    # An absent tensor needs some pointer; its flag keeps the kernel from reading it.
    _gate_residual_norm_modulate_kernel[(out.numel() // width,)](
        x,
        y,
        x if gate is None else gate,
        x if scale is None else scale,
        x if shift is None else shift,
        x if weight is None else weight,
        x if bias is None else bias,
        residual,
        out,
        x.shape[-2],
        width,
        eps,
        *row_strides(x, x),
        *row_strides(y, x),
        *row_strides(gate, x),
        *row_strides(scale, x),
        *row_strides(shift, x),
        RMS=rms,
        GATE=gate is not None,
        SCALE=scale is not None,
        SHIFT=shift is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        BLOCK=block,
        BLOCKS=blocks,
        num_warps=num_warps(block),
    )
