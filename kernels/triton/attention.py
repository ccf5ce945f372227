"""Attention forward, softmax(q kᵀ scale) v without a mask, and the merge of partial results.

One program takes `BLOCK_M` queries of one head of one sequence and walks over its keys with the
online softmax in base 2 (the scale carries log2 e). All blocks of keys but the last are whole and
need no mask. The natural log-sum-exp of every query is a second result on request.

Sequences are the rows of a batch, or parts of one packed row by `cu_seqlens`. TMA descriptors load
where the hardware has them (sm_90 and later); elsewhere, and for strides that TMA cannot take,
pointers do.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import triton
import triton.language as tl

from .settings import AttentionBlocks, attention_blocks

LOG2E = math.log2(math.e)


@triton.jit
def _rows(x_ptr, first, count, row_stride, at, dim, WHOLE: tl.constexpr):
    """Rows first + at of [count, d]; past the end zeros, unless the block is known to be whole."""
    where = x_ptr + (first + at).to(tl.int64)[:, None] * row_stride + dim[None, :]
    if WHOLE:
        return tl.load(where)
    return tl.load(where, mask=(first + at < count)[:, None], other=0.0)


@triton.jit
def _step(
    q,
    k,
    v,
    acc,
    top,
    total,
    qk_scale,
    keys,
    first,
    IEEE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of keys: the new accumulator, row maximum and row sum."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    score = tl.dot(q, tl.trans(k), input_precision=precision)
    if not WHOLE:
        inside = first + tl.arange(0, BLOCK_N) < keys
        score = tl.where(inside[None, :], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, axis=1) * qk_scale)
    p = tl.exp2(score * qk_scale - higher[:, None])
    keep = tl.exp2(top - higher)
    total = total * keep + tl.sum(p, axis=1)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=precision)
    return acc, higher, total


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    queries,
    keys,
    heads,
    qk_scale,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    out_batch,
    out_token,
    out_head,
    lse_batch,
    lse_head,
    VARLEN: tl.constexpr,
    LSE: tl.constexpr,
    IEEE: tl.constexpr,
    TMA: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    q_ptr += head * q_head
    k_ptr += head * k_head
    v_ptr += head * v_head
    out_ptr += head * out_head
    lse_ptr += head * lse_head
    if VARLEN:
        first_q = tl.load(cu_q_ptr + b)
        first_k = tl.load(cu_k_ptr + b)
        queries = tl.load(cu_q_ptr + b + 1) - first_q
        keys = tl.load(cu_k_ptr + b + 1) - first_k
        if start >= queries:
            return
        q_ptr += first_q.to(tl.int64) * q_token
        k_ptr += first_k.to(tl.int64) * k_token
        v_ptr += first_k.to(tl.int64) * v_token
        out_ptr += first_q.to(tl.int64) * out_token
        lse_ptr += first_q
    else:
        q_ptr += b * q_batch
        k_ptr += b * k_batch
        v_ptr += b * v_batch
        out_ptr += b * out_batch
        lse_ptr += b * lse_batch

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, DIM)
    acc = tl.zeros([BLOCK_M, DIM], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    whole = keys // BLOCK_N * BLOCK_N

    if TMA:
        q_rows = tl.make_tensor_descriptor(
            q_ptr,
            shape=[tl.maximum(queries, 1), DIM],
            strides=[q_token, 1],
            block_shape=[BLOCK_M, DIM],
        )
        k_rows = tl.make_tensor_descriptor(
            k_ptr,
            shape=[tl.maximum(keys, 1), DIM],
            strides=[k_token, 1],
            block_shape=[BLOCK_N, DIM],
        )
        v_rows = tl.make_tensor_descriptor(
            v_ptr,
            shape=[tl.maximum(keys, 1), DIM],
            strides=[v_token, 1],
            block_shape=[BLOCK_N, DIM],
        )
        q = q_rows.load([start, 0])
        for first in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
            k = k_rows.load([first, 0])
            v = v_rows.load([first, 0])
            acc, top, total = _step(
                q, k, v, acc, top, total, qk_scale, keys, first, IEEE, True, BLOCK_N
            )
        if whole < keys:
            k = k_rows.load([whole, 0])
            v = v_rows.load([whole, 0])
            acc, top, total = _step(
                q, k, v, acc, top, total, qk_scale, keys, whole, IEEE, False, BLOCK_N
            )
    else:
        q = _rows(q_ptr, start, queries, q_token, row, dim, False)
        for first in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
            k = _rows(k_ptr, first, keys, k_token, column, dim, True)
            v = _rows(v_ptr, first, keys, v_token, column, dim, True)
            acc, top, total = _step(
                q, k, v, acc, top, total, qk_scale, keys, first, IEEE, True, BLOCK_N
            )
        if whole < keys:
            k = _rows(k_ptr, whole, keys, k_token, column, dim, False)
            v = _rows(v_ptr, whole, keys, v_token, column, dim, False)
            acc, top, total = _step(
                q, k, v, acc, top, total, qk_scale, keys, whole, IEEE, False, BLOCK_N
            )

    # Without keys the sum is 0: the result is 0 and the log-sum-exp -inf.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = start + row < queries
    where = (start + row).to(tl.int64)
    tl.store(
        out_ptr + where[:, None] * out_token + dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None],
    )
    if LSE:
        none = total == 0.0
        lse = (top + tl.log2(tl.where(none, 1.0, total))) * 0.6931471805599453
        tl.store(lse_ptr + where, tl.where(none, float("-inf"), lse), mask=inside)


@triton.jit
def _attention_merge_kernel(
    a_ptr,
    lse_a_ptr,
    b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    rows,
    tokens,
    heads,
    a_batch,
    a_token,
    a_head,
    b_batch,
    b_token,
    b_head,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of [B, S, H]
    dim = tl.arange(0, WIDE)[None, :]
    inside = row < rows
    head = row % heads
    s = row // heads % tokens
    b = row // heads // tokens
    lse_at = (b * heads + head) * tokens + s  # of [B, H, S]
    lse_a = tl.load(lse_a_ptr + lse_at, mask=inside, other=0.0)
    lse_b = tl.load(lse_b_ptr + lse_at, mask=inside, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    top = tl.where(top == float("-inf"), 0.0, top)  # a query without keys on both sides
    share_a = tl.exp(lse_a - top)
    share_b = tl.exp(lse_b - top)
    total = share_a + share_b
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    mask = inside[:, None] & (dim < DIM)
    a = tl.load(
        a_ptr + (b * a_batch + s * a_token + head * a_head)[:, None] + dim, mask=mask, other=0.0
    )
    y = a.to(tl.float32) * (share_a / total)[:, None]
    a = tl.load(
        b_ptr + (b * b_batch + s * b_token + head * b_head)[:, None] + dim, mask=mask, other=0.0
    )
    y += a.to(tl.float32) * (share_b / total)[:, None]
    tl.store(out_ptr + row[:, None] * DIM + dim, y.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(none, float("-inf"), top + tl.log(total))
    tl.store(lse_ptr + lse_at, lse, mask=inside)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the TMA descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def _give_scratch() -> None:
    triton.set_allocator(_scratch)


def _takes_tma(*tensors: Tensor) -> bool:
    """TMA wants 16-byte aligned rows at 16-byte strides; head and batch offsets move the base."""
    return all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3])
        for x in tensors
    )


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    assert q.ndim == k.ndim == v.ndim == 4, "q [B, S, H, d], k and v [B, L, H, d]"
    assert k.shape == v.shape and q.shape[2:] == k.shape[2:] and q.shape[0] == k.shape[0], (
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    )
    assert q.dtype == k.dtype == v.dtype, f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    dim = q.shape[3]
    assert dim in (16, 32, 64, 128), f"head dim {dim} is not 16, 32, 64 or 128"
    assert (cu_q is None) == (cu_k is None), "cu_seqlens of q and k come together"
    if cu_q is not None and cu_k is not None:
        assert q.shape[0] == 1, "packed sequences are one row"
        assert cu_q.shape == cu_k.shape and cu_q.ndim == 1 and cu_q.numel() > 1
        assert cu_q.dtype == cu_k.dtype == torch.int32, "cu_seqlens are int32"


def attention_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    blocks: AttentionBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """(attention [B, S, H, d] in q's dtype, natural log-sum-exp [B, H, S] in fp32).

    q [B, S, H, d], k and v [B, L, H, d]. With cu_seqlens [sequences + 1] the one row of q, and that
    of k and v, is several sequences after each other, the longest of `max_seqlen_q` queries.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    assert scale > 0, f"a scale of {scale}"
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    sequences, longest = batch, tokens
    if cu_seqlens_q is not None:
        sequences, longest = cu_seqlens_q.numel() - 1, max_seqlen_q or tokens
    on_gpu = q.device.type == "cuda"
    sm = 10 * torch.cuda.get_device_capability(q.device)[0] if on_gpu else 90
    chosen = blocks or attention_blocks(sm, dim)
    tma = chosen.tma and k.shape[1] > 0 and _takes_tma(q, k, v)
    if tma and on_gpu:
        _give_scratch()
    _attention_kernel[(triton.cdiv(longest, chosen.m), sequences * heads)](
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        tokens,
        k.shape[1],
        heads,
        scale * LOG2E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *lse.stride()[:2],
        VARLEN=cu_seqlens_q is not None,
        LSE=True,
        IEEE=q.dtype == torch.float32,
        TMA=tma,
        DIM=dim,
        BLOCK_M=chosen.m,
        BLOCK_N=chosen.n,
        STAGES=chosen.stages,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return out, lse


def attention_merge_launch(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs [B, S, H, d], LSE [B, H, S]."""
    assert out_a.shape == out_b.shape and out_a.ndim == 4
    batch, tokens, heads, dim = out_a.shape
    assert lse_a.shape == lse_b.shape == (batch, heads, tokens)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if out.numel() == 0:
        return out, lse
    out_a, out_b = (x if x.stride(3) == 1 else x.contiguous() for x in (out_a, out_b))
    rows, wide = out.numel() // dim, triton.next_power_of_2(dim)
    block = max(1, 2048 // wide)
    _attention_merge_kernel[(triton.cdiv(rows, block),)](
        out_a,
        lse_a.float().contiguous(),
        out_b,
        lse_b.float().contiguous(),
        out,
        lse,
        rows,
        tokens,
        heads,
        *out_a.stride()[:3],
        *out_b.stride()[:3],
        DIM=dim,
        WIDE=wide,
        BLOCK=block,
        num_warps=4,
    )
    return out, lse
