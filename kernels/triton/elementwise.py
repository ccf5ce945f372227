"""Ops without a reduction over rows of tokens: gate_residual, gelu_tanh, silu_mul.

fp32 inside, rounded once. Each program takes one block of a row (gate_residual) or of the flat
tensor.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from .rows import as_rows, dense, row_strides
from .settings import FLAT_BLOCK, num_warps, row_blocks


@triton.jit
def _gate_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    width,
    x_batch,
    x_token,
    y_batch,
    y_token,
    gate_batch,
    gate_token,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // tokens
    s = row % tokens
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + b * x_batch + s * x_token + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * y_batch + s * y_token + at, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        gate_ptr += b * gate_batch + s * gate_token
        y *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + at, (x + y).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    """tanh without overflow: |x| decides the exponent, the sign comes last."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _gelu_tanh_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tl.store(
        out_ptr + at, (0.5 * x * (1.0 + _tanh(inner))).to(out_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, width, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_ptr + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(gate))  # no overflow on either side
    y = gate * tl.where(gate < 0, e, 1.0) / (1.0 + e) * up
    tl.store(out_ptr + row * width + at, y.to(out_ptr.dtype.element_ty), mask=inside)


def gate_residual_launch(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor) -> None:
    """x and y [B, S, D], or any [..., D] without a gate; gate [B, D] or what broadcasts to x.

    `out`, here and below, is contiguous and may be an input.
    """
    if out.numel() == 0:
        return
    x, y, gate = as_rows(x, gate), as_rows(y, gate), dense(gate)
    width = x.shape[-1]
    block, blocks = row_blocks(width)
    _gate_residual_kernel[(out.numel() // width, blocks)](
        x,
        y,
        x if gate is None else gate,
        out,
        x.shape[-2],
        width,
        *row_strides(x, x),
        *row_strides(y, x),
        *row_strides(gate, x),
        GATE=gate is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )


def gelu_tanh_launch(x: Tensor, out: Tensor) -> None:
    x = x.contiguous()
    if out.numel():
        grid = (triton.cdiv(out.numel(), FLAT_BLOCK),)
        _gelu_tanh_kernel[grid](x, out, out.numel(), BLOCK=FLAT_BLOCK, num_warps=4)


def silu_mul_launch(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """gate and up of one shape; two halves of one fused projection are read where they are."""
    if out.numel() == 0:
        return
    width = gate.shape[-1] if gate.ndim else 1
    gate, up = _flat_rows(gate, width), _flat_rows(up, width)
    block, blocks = row_blocks(width)
    _silu_mul_kernel[(out.numel() // width, blocks)](
        gate,
        up,
        out,
        width,
        gate.stride(0),
        up.stride(0),
        BLOCK=block,
        num_warps=num_warps(block),
    )


def _flat_rows(x: Tensor, width: int) -> Tensor:
    """[rows, width], a view where the strides allow one."""
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 or width == 1 else x.contiguous()
