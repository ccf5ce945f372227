"""Attention forward by the CUDA C++ kernel: bf16, head dim 64 and 128, with log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion.ops import library

HEAD_DIMS = (64, 128)


@library.fake("cuda_attention")
def _fake(*_: object) -> None:
    """The results are there already."""


def refuses(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str:
    for x in (q, k, v):
        if x.dtype != torch.bfloat16:
            return f"tensors of {x.dtype}"
        if x.stride(-1) != 1 or any(stride % 8 for stride in x.stride()[:-1]):
            return "heads that are not dense, or do not start at multiples of 16 bytes"
        if x.storage_offset() % 8:
            return "a view that does not start at a multiple of 16 bytes"
    return "" if q.shape[-1] in HEAD_DIMS else f"head dim {q.shape[-1]} is not 64 or 128"


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
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    torch.ops.sgld.cuda_attention.default(
        q,
        k,
        v,
        q.shape[-1] ** -0.5 if scale is None else scale,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q or 0,
        out,
        lse,
    )
    return out, lse
