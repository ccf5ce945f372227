"""Attention in float64 with its log-sum-exp, written as the formula reads."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, S, H, d], k and v [B, L, H, d] -> ([B, S, H, d], [B, H, S])."""
    score = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) * scale
    if k.shape[1] == 0:
        return torch.zeros(q.shape, dtype=torch.float64, device=q.device), torch.full(
            score.shape[:3], float("-inf"), dtype=torch.float64, device=q.device
        )
    lse = torch.logsumexp(score, dim=-1)
    p = torch.exp(score - lse[..., None])
    return torch.einsum("bhsl,blhd->bshd", p, v.double()), lse
