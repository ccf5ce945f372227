"""norm_modulate: LayerNorm or RMSNorm, then an affine modulation per batch or per token."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sgl_diffusion.ops import library, torch_impl, triton_impl
from sgl_diffusion.ops.dispatch import FLOATS, Implementation, Op


def _refuses(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out_dtype: torch.dtype,
) -> str:
    """What the hand-written kernels have in common."""
    for part in (scale, shift, weight, bias):
        if part is not None and part.dtype not in FLOATS:
            return f"modulation of {part.dtype}"
    if x.ndim > 3 and (scale is not None or shift is not None):
        return f"modulation of {x.ndim} dimensions"
    return "" if out_dtype in FLOATS else f"a result of {out_dtype}"


def _native(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.ops.sgld.norm_modulate.default(
        x, scale, shift, weight, bias, eps, kind == "rms", out_dtype
    )


@library.fake("norm_modulate")
def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=args[-1])


_norm_modulate = Op(
    "norm_modulate",
    torch_impl.norm_modulate,
    Implementation("cpu", _native, ("cpu",), absent=library.absent, refuses=_refuses),
    Implementation(
        "cuda",
        _native,
        ("cuda",),
        sm=range(80, 1000),
        absent=library.without_cuda,
        refuses=_refuses,
    ),
    Implementation(
        "triton",
        triton_impl.norm_modulate,
        ("cuda",),
        sm=range(80, 1000),
        named_devices=("cpu",),
        absent=triton_impl.absent,
        refuses=lambda x, *args: triton_impl.refuses(x) or _refuses(x, *args),
    ),
)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: Literal["layer", "rms"] = "layer",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`(norm(x) * weight + bias) * (1 + scale) + shift`, fp32 inside, rounded once.

    x [B, S, D] (or [..., D] without modulation); scale and shift [B, D] or [B, 1, D] (one per batch
    row), [B, S, D] (one per token), [D], or None; weight and bias [D] or None. Every tensor may
    have its own dtype; the result has `out_dtype`, else x's.
    """
    assert kind in ("layer", "rms"), kind
    return _norm_modulate(x, scale, shift, weight, bias, eps, kind, out_dtype or x.dtype)
