"""Attention forward and the merge of partial results, by Triton."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sgl_diffusion.ops import triton_impl
from sgl_diffusion.ops.dispatch import FLOATS
from sgl_diffusion.ops.triton_register import register

HEAD_DIMS = (64, 128)


@functools.cache
def _library() -> torch.library.Library:
    from sgl_diffusion.kernels.attention import attention_launch, attention_merge_launch

    def fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        return q.new_empty(q.shape), lse

    def merge_fake(
        out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape, dtype=torch.float32)

    return register(
        (
            "attention(Tensor q, Tensor k, Tensor v, float? scale, Tensor? cu_seqlens_q, "
            "Tensor? cu_seqlens_k, int? max_seqlen_q) -> (Tensor, Tensor)",
            attention_launch,
            fake,
        ),
        (
            "attention_merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
            "-> (Tensor, Tensor)",
            attention_merge_launch,
            merge_fake,
        ),
    )


def refuses(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str:
    if not q.dtype == k.dtype == v.dtype:
        return "q, k and v of different dtypes"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head dim {q.shape[-1]} is not 64 or 128"
    if q.device.type == "cuda" and q.dtype == torch.float32:
        return "on a GPU it computes in fp16 and bf16"
    return triton_impl.refuses(q)


def refuses_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str:
    for x in (out_a, out_b):
        if x.dtype not in FLOATS:
            return f"a result of {x.dtype}"
    return triton_impl.refuses(out_a)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, d], k and v [B, L, H, d] -> ([B, S, H, d], natural log-sum-exp [B, H, S]).

    With cu_seqlens (int32, [sequences + 1]) the one row is several sequences after each other.
    """
    _library()
    out: tuple[Tensor, Tensor] = torch.ops.sgld_triton.attention.default(
        q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q
    )
    return out


def attention_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the results over each; packed: [N, H, d], [H, N]."""
    _library()
    if out_a.ndim == 3:
        parts = attention_merge(out_a[None], lse_a[None], out_b[None], lse_b[None])
        return parts[0][0], parts[1][0]
    out: tuple[Tensor, Tensor] = torch.ops.sgld_triton.attention_merge.default(
        out_a, lse_a, out_b, lse_b
    )
    return out
