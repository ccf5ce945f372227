"""The torch truth of every op: plain torch, fp32 inside, rounded once at the end.

It runs on every device and dtype, is what the other implementations are compared with, and is what
a process without the native library computes with. fp64 inputs stay fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _wide(x: Tensor) -> Tensor:
    """x in the dtype the maths is done in."""
    return x if x.dtype == torch.float64 else x.float()


def per_token(modulation: Tensor, x: Tensor) -> Tensor:
    """A [B, D] modulation of [B, S, D] as [B, 1, D]; every other shape broadcasts as it is."""
    rows = modulation.unsqueeze(-2) if modulation.ndim == 2 and x.ndim == 3 else modulation
    fits = rows.ndim <= x.ndim and rows.shape[-1] == x.shape[-1]
    for axis in range(2, rows.ndim + 1):
        fits = fits and rows.shape[-axis] in (1, x.shape[-axis])
    assert fits, f"a modulation {tuple(modulation.shape)} does not fit x {tuple(x.shape)}"
    return rows


def norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out_dtype: torch.dtype,
) -> Tensor:
    y = _wide(x)
    if kind == "layer":
        y = functional.layer_norm(y, y.shape[-1:], eps=eps)
    else:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    if scale is not None:
        y = y * (1 + _wide(per_token(scale, x)))
    if shift is not None:
        y = y + _wide(per_token(shift, x))
    return y.to(out_dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    update = _wide(y) if gate is None else _wide(y) * _wide(per_token(gate, x))
    return (_wide(x) + update).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, norm: str) -> Tensor:
    """RMSNorm of [B, S, H, d] over H*d ("full") or over d ("head")."""
    axes = (-2, -1) if norm == "full" else (-1,)
    y = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    return y * _wide(weight).view(x.shape[-2:] if norm == "full" else x.shape[-1:])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: str) -> Tensor:
    """Rotate the pairs of each head of [B, S, H, d] by the angles of its token."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if rotary == "interleaved":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    rotary: str,
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        y = _wide(x)
        if weight is not None:
            y = _rms_norm(y, weight, eps, norm)
        if cos is not None and sin is not None:
            y = _rotate(y, cos, sin, rotary)
        return y.to(x.dtype)

    return one(q, weight_q), one(k, weight_k)


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return (functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)
