"""qk_norm_rope: RMSNorm of queries and keys, then the rotary embedding, in one pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sgl_diffusion.ops import cuda_norms, library, torch_impl, triton_rope
from sgl_diffusion.ops.buffers import into, room
from sgl_diffusion.ops.dispatch import FLOATS, Implementation, Op
from sgl_diffusion.ops.triton_register import implementation

Part = Tensor | None


def _truth(
    q: Tensor,
    k: Tensor,
    weight_q: Part,
    weight_k: Part,
    cos: Part,
    sin: Part,
    eps: float,
    norm: str,
    rotary: str,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    done = torch_impl.qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps, norm, rotary)
    return (into(q, done[0]), into(k, done[1])) if in_place else done


def _native(
    q: Tensor,
    k: Tensor,
    weight_q: Part,
    weight_k: Part,
    cos: Part,
    sin: Part,
    eps: float,
    norm: str,
    rotary: str,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = (q, k) if in_place else (room(q), room(k))
    torch.ops.sgld.qk_norm_rope.default(
        q, k, weight_q, weight_k, cos, sin, eps, norm == "head", rotary == "half", q_out, k_out
    )
    return q_out, k_out


def _refuses(
    q: Tensor,
    k: Tensor,
    weight_q: Part,
    weight_k: Part,
    cos: Part,
    sin: Part,
    eps: float,
    norm: str,
    rotary: str,
    in_place: bool,
) -> str:
    if k.dtype != q.dtype:
        return f"keys of {k.dtype}"
    for x in (q, k):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return "heads that are not dense"
    for weight in (weight_q, weight_k):
        if weight is not None and weight.dtype not in FLOATS:
            return f"weights of {weight.dtype}"
    for table in (cos, sin):
        if table is not None and table.dtype != torch.float32:
            return f"angles of {table.dtype}"
    return ""


library.fake("qk_norm_rope")(lambda *args: None)

_qk_norm_rope = Op(
    "qk_norm_rope",
    _truth,
    Implementation("cpu", _native, ("cpu",), absent=library.absent, refuses=_refuses),
    Implementation(
        "cuda",
        cuda_norms.qk_norm_rope,
        ("cuda",),
        sm=range(80, 1000),
        absent=library.without_cuda,
        refuses=cuda_norms.refuses_rope,
    ),
    implementation(triton_rope.qk_norm_rope, triton_rope.refuses),
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None = None,
    weight_k: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: Literal["full", "head"] = "full",
    rotary: Literal["interleaved", "half"] = "interleaved",
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q and k, fp32 inside, rounded once; the results are new tensors.

    q [B, S, H, d] and k [B, T, H, d], any strides (views of one fused QKV output). A weight of None
    leaves that tensor unnormalised. norm="full": RMSNorm over H*d, weights [H*d]; norm="head": over
    d, weights [d]. cos and sin [S, d/2] fp32, or both None for no rotation; then T may differ from
    S. rotary="interleaved" rotates (x0, x1), (x2, x3), ...; "half" rotates (x0, x[d/2]), (x1,
    x[d/2+1]), ...
    """
    _check(q, k, weight_q, weight_k, cos, sin, norm, rotary)
    return _qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps, norm, rotary, False)


def qk_norm_rope_(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None = None,
    weight_k: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: Literal["full", "head"] = "full",
    rotary: Literal["interleaved", "half"] = "interleaved",
) -> None:
    """`qk_norm_rope` in place: q and k, for example views of one fused QKV output, are replaced."""
    _check(q, k, weight_q, weight_k, cos, sin, norm, rotary)
    _qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps, norm, rotary, True)


def _check(
    q: Tensor,
    k: Tensor,
    weight_q: Part,
    weight_k: Part,
    cos: Part,
    sin: Part,
    norm: str,
    rotary: str,
) -> None:
    assert norm in ("full", "head") and rotary in ("interleaved", "half"), (norm, rotary)
    assert q.ndim == k.ndim == 4, f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [B, S, H, d]"
    assert (cos is None) == (sin is None), "cos and sin come together"
    if cos is not None and sin is not None:
        angles = (q.shape[1], q.shape[3] // 2)
        assert k.shape[1] == q.shape[1] and cos.shape == sin.shape == angles, (
            f"cos {tuple(cos.shape)} must be [S, d/2] = {angles} of q and k"
        )
    for x, weight in ((q, weight_q), (k, weight_k)):
        width = x.shape[2] * x.shape[3] if norm == "full" else x.shape[3]
        assert weight is None or weight.shape == (width,), f"a {norm} norm needs weights [{width}]"
