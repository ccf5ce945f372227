"""lora_apply_: y += scale * (x Aᵀ) Bᵀ with the adapter of each token, several adapters a batch.

Two launches: shrink to the rank in fp32, expand into y. Both walk over their tiles with a fixed
number of programs. A tile of tokens runs once for every adapter between the smallest and the
largest one it holds, with the rows of the others as zeros: requests lie after each other in a
batch, so most tiles hold one adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .settings import LORA_APPLY, LORA_PROGRAMS_PER_SM


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    index_ptr,
    h_ptr,
    tokens,
    width,
    rank,
    adapters,
    x_row,
    a_adapter,
    a_row,
    tiles,
    IEEE: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
):
    lane = tl.arange(0, RANK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = tile * M + tl.arange(0, M)
        index = tl.load(index_ptr + token, mask=token < tokens, other=-1)
        last = tl.max(index, axis=0)
        first = tl.min(tl.where(index < 0, adapters, index), axis=0)
        rows = x_ptr + token.to(tl.int64)[:, None] * x_row
        h = tl.zeros([M, RANK], dtype=tl.float32)
        for adapter in range(first, last + 1):
            mine = index == adapter
            a = a_ptr + adapter * a_adapter + lane[None, :] * a_row
            for start in range(0, width, K):
                at = start + tl.arange(0, K)
                x = tl.load(
                    rows + at[None, :], mask=mine[:, None] & (at < width)[None, :], other=0.0
                )
                down = tl.load(
                    a + at[:, None], mask=(at < width)[:, None] & (lane < rank)[None, :], other=0.0
                )
                h = tl.dot(x, down, h, input_precision="ieee" if IEEE else "tf32")
        where = h_ptr + token.to(tl.int64)[:, None] * RANK + lane[None, :]
        tl.store(where, h, mask=(token < tokens)[:, None])


@triton.jit
def _expand_kernel(
    h_ptr,
    b_ptr,
    scales_ptr,
    index_ptr,
    y_ptr,
    tokens,
    width,
    rank,
    adapters,
    b_adapter,
    b_row,
    y_row,
    tiles,
    SCALED: tl.constexpr,
    IEEE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
):
    lane = tl.arange(0, RANK)
    across = tl.cdiv(width, N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = (tile // across) * M + tl.arange(0, M)
        at = (tile % across) * N + tl.arange(0, N)
        index = tl.load(index_ptr + token, mask=token < tokens, other=-1)
        last = tl.max(index, axis=0)
        first = tl.min(tl.where(index < 0, adapters, index), axis=0)
        h_where = h_ptr + token.to(tl.int64)[:, None] * RANK + lane[None, :]
        inside = (index >= 0)[:, None] & (at < width)[None, :]
        where = y_ptr + token.to(tl.int64)[:, None] * y_row + at[None, :]
        y = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        for adapter in range(first, last + 1):
            h = tl.load(h_where, mask=(index == adapter)[:, None], other=0.0)
            up = tl.load(
                b_ptr + adapter * b_adapter + at[None, :] * b_row + lane[:, None],
                mask=(at < width)[None, :] & (lane < rank)[:, None],
                other=0.0,
            )
            part = tl.dot(h.to(up.dtype), up, input_precision="ieee" if IEEE else "tf32")
            if SCALED:
                part *= tl.load(scales_ptr + adapter)
            y += part
        tl.store(where, y.to(y_ptr.dtype.element_ty), mask=inside)


def lora_apply_launch(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor | None, index: Tensor
) -> Tensor:
    """y [T, out] in place, x [T, in], a [n, rank, in], b [n, out, rank], scales [n] fp32.

    index [T] int32 names the adapter of a token; -1 is none. Adapters of a lower rank are padded
    with zeros. Without scales they are 1, and b may be fp32: it has them multiplied in.
    """
    tokens, width = x.shape
    count, rank, _ = a.shape
    out = y.shape[1]
    assert a.shape == (count, rank, width) and b.shape == (count, out, rank) and rank > 0, (
        f"x {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}, y {tuple(y.shape)}"
    )
    assert y.shape[0] == tokens and index.shape == (tokens,) and index.dtype == torch.int32
    if scales is not None:
        assert scales.shape == (count,) and scales.dtype == torch.float32
    wide = scales is None and b.dtype == torch.float32
    assert x.dtype == a.dtype and (wide or b.dtype == x.dtype), (
        f"x {x.dtype}, a {a.dtype}, b {b.dtype}"
    )
    assert y.stride(1) == 1 or out == 1, "y is written in place: its rows must be dense"
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    # Some ranks of larger factors are taken where they lie.
    a, b = (f if f.stride(2) == 1 or f.shape[2] == 1 else f.contiguous() for f in (a, b))
    assert count * max(a.stride(0), b.stride(0)) < 2**31, "adapters of 2^31 elements or more"
    wide = max(16, triton.next_power_of_2(rank))
    h = torch.empty(tokens, wide, dtype=torch.float32, device=x.device)
    programs = 4
    if x.device.type == "cuda":
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        programs = processors * LORA_PROGRAMS_PER_SM
    ieee, blocks = x.dtype == torch.float32, LORA_APPLY
    tiles = triton.cdiv(tokens, blocks.shrink_m)
    _shrink_kernel[(min(tiles, programs),)](
        x,
        a,
        index,
        h,
        tokens,
        width,
        rank,
        count,
        x.stride(0),
        a.stride(0),
        a.stride(1),
        tiles,
        IEEE=ieee,
        M=blocks.shrink_m,
        K=blocks.shrink_k,
        RANK=wide,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    tiles = triton.cdiv(tokens, blocks.expand_m) * triton.cdiv(out, blocks.expand_n)
    _expand_kernel[(min(tiles, programs),)](
        h,
        b,
        y if scales is None else scales,
        index,
        y,
        tokens,
        out,
        rank,
        count,
        b.stride(0),
        b.stride(1),
        y.stride(0),
        tiles,
        SCALED=scales is not None,
        IEEE=ieee,
        M=blocks.expand_m,
        N=blocks.expand_n,
        RANK=wide,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return y
