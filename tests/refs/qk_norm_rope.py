"""RMSNorm and rotation of one of q and k, in float64, with the rotation as complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float,
    norm: str,
    rotary: str,
) -> Tensor:
    batch, tokens, heads, dim = x.shape
    y = x.double()
    if weight is not None:
        if norm == "full":
            y = y.reshape(batch, tokens, heads * dim)
        y = y / torch.sqrt((y**2).mean(-1, keepdim=True) + eps) * weight.double()
        y = y.reshape(batch, tokens, heads, dim)
    if cos is None or sin is None:
        return y
    turn = torch.complex(cos.double(), sin.double())[:, None, :]
    if rotary == "interleaved":
        turned = torch.complex(y[..., 0::2], y[..., 1::2]) * turn
        return torch.stack((turned.real, turned.imag), -1).reshape(x.shape)
    turned = torch.complex(y[..., : dim // 2], y[..., dim // 2 :]) * turn
    return torch.cat((turned.real, turned.imag), -1)
