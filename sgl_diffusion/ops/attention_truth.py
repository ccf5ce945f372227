"""The torch truth of attention and attention_merge: plain torch, fp32 inside, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at a time.
_MOST_SCORES = 1 << 26


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, S, H, d] and [B, H, S] of one batch of sequences, a block of queries at a time."""
    q, k, v = (_wide(x).transpose(1, 2) for x in (q, k, v))
    batch, heads, _, length = *q.shape[:3], k.shape[2]
    rows = max(1, _MOST_SCORES // max(1, batch * heads * length))
    outs, sums = [], []
    for block in q.split(rows, dim=2):
        scores = block @ k.transpose(-1, -2) * scale
        sums.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v)
    return torch.cat(outs, dim=2).transpose(1, 2), torch.cat(sums, dim=2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lse: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, sums = _one(q, k, v, scale)
        return out.to(q.dtype), sums.float()
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, ends, tokens in (("q", ends_q, len(q)), ("k", ends_k, len(k))):
        fits = len(ends_q) == len(ends_k) > 0 and ends[0] == 0 and ends[-1] == tokens
        assert fits and sorted(ends) == ends, f"cu_seqlens_{name} {ends} does not cut {tokens}"
    out, sums = q.new_empty(q.shape), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    for i in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        part, logs = _one(q[None, rows], k[None, keys], v[None, keys], scale)
        out[rows], sums[:, rows] = part[0].to(q.dtype), logs[0]
    return out, sums


def attention_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    # Where neither has keys the difference is NaN and both results are zeros.
    share_a, share_b = (
        (x - lse).exp().nan_to_num(0.0).transpose(-1, -2).unsqueeze(-1) for x in (lse_a, lse_b)
    )
    return (_wide(out_a) * share_a + _wide(out_b) * share_b).to(out_a.dtype), lse
