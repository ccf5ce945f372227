"""attention: softmax(q kᵀ · scale) v per head, no mask; attention_merge joins two results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sgl_diffusion.ops import attention_truth, cuda_attention, library, triton_attention
from sgl_diffusion.ops.dispatch import Implementation, Op
from sgl_diffusion.ops.triton_register import implementation

MOST_HEAD_DIM = 256
HEAD_DIM_STEP = 8


def head_dim_refused(head_dim: int) -> str:
    """Why the native kernels cannot take a head dim, or ""."""
    if head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MOST_HEAD_DIM:
        return f"head dim {head_dim} is not a multiple of {HEAD_DIM_STEP} up to {MOST_HEAD_DIM}"
    return ""


def _refuses(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str:
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "q, k and v of different dtypes"
    return head_dim_refused(q.shape[-1])


def _native(*args: Any) -> Any:
    return torch.ops.sgld.attention.default(*args)


@library.fake("attention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lse: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    *batch, tokens, heads, _ = q.shape
    sums = (*batch, heads, tokens) if lse else (0,)
    return q.new_empty(q.shape), q.new_empty(sums, dtype=torch.float32)


@library.fake("attention_merge")
def _fake_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _on_gpu(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A GPU kernel as the op calls it: packed sequences are one row, the log-sum-exp is free."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lse: bool,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return run(q, k, v, scale)
        out, sums = run(q[None], k[None], v[None], scale, cu_seqlens_q.int(), cu_seqlens_k.int())
        return out[0], sums[0]

    return call


_attention = Op(
    "attention",
    attention_truth.attention,
    Implementation("cpu", _native, ("cpu",), absent=library.absent, refuses=_refuses),
    Implementation(
        "cuda_sm90",
        _on_gpu(cuda_attention.attention_sm90),
        ("cuda",),
        dtypes=(torch.bfloat16,),
        sm=range(90, 91),
        absent=library.without_cuda,
        refuses=cuda_attention.refuses_sm90,
    ),
    Implementation(
        "cuda",
        _on_gpu(cuda_attention.attention),
        ("cuda",),
        dtypes=(torch.bfloat16,),
        sm=range(80, 1000),
        absent=library.without_cuda,
        refuses=cuda_attention.refuses,
    ),
    implementation(_on_gpu(triton_attention.attention), triton_attention.refuses),
)

_attention_merge = Op(
    "attention_merge",
    attention_truth.attention_merge,
    Implementation(
        "cpu",
        lambda *args: torch.ops.sgld.attention_merge.default(*args),
        ("cpu",),
        absent=library.absent,
        refuses=lambda a, x, b, y: (
            "" if x.dtype == y.dtype == torch.float32 else "a log-sum-exp that is not float32"
        ),
    ),
    implementation(triton_attention.attention_merge, triton_attention.refuses_merge),
)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lse: Literal[False] = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lse: Literal[True],
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(q kᵀ · scale) v` per head, fp32 inside; scale is 1/√d unless given.

    q [B, S, H, d], k and v [B, L, H, d], any strides. Packed: q [N, H, d], k and v [M, H, d], and
    sequence i has the queries cu_seqlens_q[i:i+2] and the keys cu_seqlens_k[i:i+2] (int32 or int64,
    on the CPU for CPU tensors). With `lse` also the natural logarithms of the softmax sums, fp32
    [B, H, S] or packed [H, N]. No keys give zeros and -inf.
    """
    packed = cu_seqlens_q is not None
    assert packed == (cu_seqlens_k is not None), "cu_seqlens_q and cu_seqlens_k come together"
    _check(q, k, v, packed)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, sums = _attention(q, k, v, scale, lse, cu_seqlens_q, cu_seqlens_k)
    return (out, sums) if lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    names = "[N, H, d]" if packed else "[B, S, H, d]"
    assert q.ndim == (3 if packed else 4), f"q {tuple(q.shape)} must be {names}"
    batch, heads = q.shape[: -3 if packed else 1], q.shape[-2:]
    for name, x in (("k", k), ("v", v)):
        fits = x.ndim == q.ndim and x.shape[-2:] == heads
        fits = fits and (packed or x.shape[:1] == batch) and x.shape[-3] == k.shape[-3]
        assert fits, f"{name} {tuple(x.shape)} does not fit q {tuple(q.shape)} as {names}"


def attention_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Two results of attention of the same queries over different keys, as if over all of them.

    out_a, out_b [B, S, H, d] with lse_a, lse_b [B, H, S], or packed [N, H, d] with [H, N]. The
    result has the dtype of out_a, computed in fp32; log-sum-exps are fp32.
    """
    sums = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    assert out_a.shape == out_b.shape, f"out_b {tuple(out_b.shape)}: out_a {tuple(out_a.shape)}"
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        assert x.shape == sums, f"{name} {tuple(x.shape)} must be [.., H, S] = {sums}"
    out, merged = _attention_merge(out_a, lse_a, out_b, lse_b)
    return out, merged
