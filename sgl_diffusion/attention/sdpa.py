"""Attention by torch's scaled_dot_product_attention: every device, every float type."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sgl_diffusion.attention.base import AttendRepeated
from sgl_diffusion.attention.packed import RowLengths, one_by_one


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

    def repeated(self, device: torch.device) -> AttendRepeated | None:
        # Elsewhere scores that something is added to have no kernel that was measured.
        return self._forward_repeated if device.type == "cpu" else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
        )
        return out.transpose(1, 2)

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: RowLengths, *, scale: float | None = None
    ) -> Tensor:
        return one_by_one(self.forward, q, k, v, lengths, scale)

    def _forward_repeated(
        self, q: Tensor, k: Tensor, v: Tensor, repeats: Tensor, *, scale: float | None = None
    ) -> Tensor:
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=repeats[:, None, None],
            scale=scale,
        )
        return out.transpose(1, 2)
