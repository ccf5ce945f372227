"""qk_norm_rope: RMSNorm of queries and keys, then the rotary embedding, in one pass."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sgl_diffusion.ops import cuda_norms, library, torch_impl, triton_rope
from sgl_diffusion.ops.dispatch import Implementation, Op
from sgl_diffusion.ops.triton_register import implementation

_qk_norm_rope = Op(
    "qk_norm_rope",
    torch_impl.qk_norm_rope,
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
    return _qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps, norm, rotary)
