"""qk_norm_rope: RMSNorm of q and k over a token ("full") or a head, then the rotary embedding.

One program takes one token of q or of k: all heads of a full norm, `HEADS` of them of a head norm.
A pair that rotates together is held as two tensors [heads, d / 2]: both kinds of rotation are then
the same arithmetic. Inputs and outputs may have any strides over tokens and heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .settings import rope_blocks


@triton.jit
def _load_pair(x_ptr, head, dim, inside, head_stride, INTERLEAVED, DIM, HALF, HEADS):
    """The first and second members of every pair, fp32 [HEADS, HALF]."""
    if INTERLEAVED:
        lane = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(x_ptr + head * head_stride + lane, mask=inside & (lane < DIM), other=0.0).to(
            tl.float32
        )
        return tl.split(tl.reshape(x, [HEADS, HALF, 2]))
    at = x_ptr + head * head_stride + dim
    half = inside & (dim < DIM // 2)
    first = tl.load(at, mask=half, other=0.0).to(tl.float32)
    return first, tl.load(at + DIM // 2, mask=half, other=0.0).to(tl.float32)


@triton.jit
def _norm_rope_part(
    x_ptr,
    weight_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    first_head,
    heads,
    eps,
    x_head,
    out_head,
    FULL: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = first_head + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, HALF)[None, :]
    inside = head < heads
    a, b = _load_pair(x_ptr, head, dim, inside, x_head, INTERLEAVED, DIM, HALF, HEADS)
    if WEIGHT:
        square = tl.sum(a * a + b * b, axis=1)[:, None]
        if FULL:
            square = tl.sum(square) / (heads * DIM)
        else:
            square = square / DIM
        rstd = 1.0 / tl.sqrt(square + eps)
        row = head * DIM if FULL else head * 0
        wa, wb = _load_pair(
            weight_ptr + row, head * 0, dim, inside, 0, INTERLEAVED, DIM, HALF, HEADS
        )
        a = a * rstd * wa
        b = b * rstd * wb
    if ROTATE:
        angle = dim < DIM // 2
        cos = tl.load(cos_ptr + dim, mask=angle, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + dim, mask=angle, other=0.0).to(tl.float32)
        a, b = a * cos - b * sin, a * sin + b * cos
    kind = out_ptr.dtype.element_ty
    if INTERLEAVED:
        lane = tl.arange(0, 2 * HALF)[None, :]
        y = tl.reshape(tl.join(a, b), [HEADS, 2 * HALF]).to(kind)
        tl.store(out_ptr + head * out_head + lane, y, mask=inside & (lane < DIM))
    else:
        half = inside & (dim < DIM // 2)
        at = out_ptr + head * out_head + dim
        tl.store(at, a.to(kind), mask=half)
        tl.store(at + DIM // 2, b.to(kind), mask=half)


@triton.jit
def _qk_norm_rope_kernel(
    q_ptr,
    k_ptr,
    weight_q_ptr,
    weight_k_ptr,
    out_q_ptr,
    out_k_ptr,
    cos_ptr,
    sin_ptr,
    q_rows,
    q_tokens,
    k_tokens,
    q_heads,
    k_heads,
    eps,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    out_q_batch,
    out_q_token,
    out_q_head,
    out_k_batch,
    out_k_token,
    out_k_head,
    FULL: tl.constexpr,
    WEIGHT_Q: tl.constexpr,
    WEIGHT_K: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    if row < q_rows:
        b = row // q_tokens
        s = row % q_tokens
        _norm_rope_part(
            q_ptr + b * q_batch + s * q_token,
            weight_q_ptr,
            out_q_ptr + b * out_q_batch + s * out_q_token,
            cos_ptr + s * (DIM // 2),
            sin_ptr + s * (DIM // 2),
            first_head,
            q_heads,
            eps,
            q_head,
            out_q_head,
            FULL,
            WEIGHT_Q,
            ROTATE,
            INTERLEAVED,
            DIM,
            HALF,
            HEADS,
        )
    else:
        row -= q_rows
        b = row // k_tokens
        s = row % k_tokens
        _norm_rope_part(
            k_ptr + b * k_batch + s * k_token,
            weight_k_ptr,
            out_k_ptr + b * out_k_batch + s * out_k_token,
            cos_ptr + s * (DIM // 2),
            sin_ptr + s * (DIM // 2),
            first_head,
            k_heads,
            eps,
            k_head,
            out_k_head,
            FULL,
            WEIGHT_K,
            ROTATE,
            INTERLEAVED,
            DIM,
            HALF,
            HEADS,
        )


def qk_norm_rope_launch(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    full: bool,
    interleaved: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, d] and k [B, T, H, d]; the results are new, or q and k themselves (in place)."""
    assert q.ndim == k.ndim == 4 and q.shape[3] == k.shape[3] and q.shape[3] % 2 == 0
    if in_place:
        assert q.stride(3) == k.stride(3) == 1, "in place needs heads that are dense"
        out_q, out_k = q, k
    else:
        out_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        q = q if q.stride(3) == 1 else q.contiguous()
        k = k if k.stride(3) == 1 else k.contiguous()
    q_rows, k_rows = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    if q.numel() == 0 and k.numel() == 0:
        return out_q, out_k
    weight_q, weight_k, cos, sin = (
        part if part is None else part.contiguous() for part in (weight_q, weight_k, cos, sin)
    )
    dim, most = q.shape[3], max(q.shape[2], k.shape[2])
    whole = full and (weight_q is not None or weight_k is not None)
    half, heads, warps = rope_blocks(most, dim, whole)
    _qk_norm_rope_kernel[(q_rows + k_rows, triton.cdiv(most, heads))](
        q,
        k,
        q if weight_q is None else weight_q,
        k if weight_k is None else weight_k,
        out_q,
        out_k,
        q if cos is None else cos,
        q if sin is None else sin,
        q_rows,
        max(1, q.shape[1]),
        max(1, k.shape[1]),
        q.shape[2],
        k.shape[2],
        eps,
        *q.stride()[:3],
        *k.stride()[:3],
        *out_q.stride()[:3],
        *out_k.stride()[:3],
        FULL=full,
        WEIGHT_Q=weight_q is not None,
        WEIGHT_K=weight_k is not None,
        ROTATE=cos is not None,
        INTERLEAVED=interleaved,
        DIM=dim,
        HALF=half,
        HEADS=heads,
        num_warps=warps,
    )
    return out_q, out_k
