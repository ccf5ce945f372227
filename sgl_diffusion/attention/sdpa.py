"""Attention by torch's scaled_dot_product_attention: every device, every float type."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class SdpaBackend:
    name = "sdpa"

    def supports(
        self, device: torch.device, head_dim: int, dtype: torch.dtype, needs_lse: bool
    ) -> str | None:
        return "it gives no log-sum-exp" if needs_lse else None

    def unproven(self, device: torch.device) -> str | None:
        return None

    def slower(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def least_queries(self, device: torch.device, dtype: torch.dtype) -> int:
        return 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
        )
        return out.transpose(1, 2)
