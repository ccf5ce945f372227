"""quant_fp8_rowwise: x as float8_e4m3 values and one fp32 scale max|x| / 448 per row.

x is close to value * scale. The scale has a floor, so that its inverse is finite. One program per
row; a row of several blocks stays in registers between the maximum and the division.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .settings import held_blocks, num_warps

LARGEST = 448.0  # of float8_e4m3
SMALLEST_SCALE = 2.0**-100


@triton.jit
def _quant_fp8_rowwise_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    width,
    x_row,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    held = ()
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        at = block * BLOCK + lane
        x = tl.load(x_ptr + row * x_row + at, mask=at < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        held = held + (x,)
    top = tl.max(largest, axis=0)
    scale = tl.maximum(top / LARGEST, SMALLEST)
    tl.store(scale_ptr + row, scale)
    inverse = 1.0 / scale
    for block in tl.static_range(BLOCKS):
        at = block * BLOCK + lane
        # The product may round past the largest value, which would become NaN.
        y = tl.clamp(held[block] * inverse, -LARGEST, LARGEST)
        tl.store(out_ptr + row * width + at, y.to(out_ptr.dtype.element_ty), mask=at < width)


def quant_fp8_rowwise_launch(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn of x's shape, one fp32 scale a row)."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, scale.fill_(SMALLEST_SCALE)
    width = x.shape[-1]
    x = x.reshape(-1, width)
    x = x if x.stride(1) == 1 else x.contiguous()
    block, blocks = held_blocks(width)
    _quant_fp8_rowwise_kernel[(x.shape[0],)](
        x,
        out,
        scale,
        width,
        x.stride(0),
        LARGEST=LARGEST,
        SMALLEST=SMALLEST_SCALE,
        BLOCK=block,
        BLOCKS=blocks,
        num_warps=num_warps(block),
    )
    return out, scale
