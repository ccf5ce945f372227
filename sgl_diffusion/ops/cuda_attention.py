"""Attention forward by the CUDA C++ kernels: bf16, head dim 64 and 128, with log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgl_diffusion.ops import library

HEAD_DIMS = (64, 128)


@library.fake("cuda_attention")
@library.fake("cuda_sm90_attention")
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


def refuses_sm90(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str:
    """As `refuses`; the copy engine takes no dimension whose rows are all one row in memory."""
    for x in (q, k, v):
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            return "an expanded tensor"
    return refuses(q, k, v, *rest)


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
    kernel = torch.ops.sgld.cuda_attention.default
    return _run(kernel, q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)


def attention_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, by TMA and wgmma: on sm_90 only."""
    kernel = torch.ops.sgld.cuda_sm90_attention.default
    return _run(kernel, q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)


def _run(
    kernel: Callable[..., None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel(q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, out, lse)
    return out, lse
