"""Attention in float64, written as the formula reads. Shared by tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The result [B, S, H, d] and the log-sum-exp of the scores [B, H, S]."""
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double())
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v.double())
    return out, scores.logsumexp(-1)


def attention_merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Any number of results over different keys, each with its log-sum-exp, as one."""
    sums = torch.stack([lse.double() for _, lse in parts])
    shares = sums.softmax(0).transpose(-1, -2).unsqueeze(-1)
    outs = torch.stack([out.double() for out, _ in parts])
    return (outs * shares).sum(0), sums.logsumexp(0)
