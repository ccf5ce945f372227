"""Attention by the op of this package, with log-sum-exp: the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.ops import library
from sgl_diffusion.ops.attention import head_dim_refused
from sgl_diffusion.ops.dispatch import FLOATS


class NativeBackend:
    name = "native"

    def supports(
        self, device: torch.device, head_dim: int, dtype: torch.dtype, needs_lse: bool
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs on cpu, not on {device.type}"
        if dtype not in FLOATS:
            return f"it computes in fp32, bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
        return head_dim_refused(head_dim) or library.absent() or None

    def slower(self) -> str | None:
        if torch.ops.sgld.cpu_isa() == "scalar":
            return "sdpa is faster than its scalar kernels"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        return ops.attention(q, k, v, scale=scale)

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The result and its log-sum-exp, fp32 [B, H, S]."""
        return ops.attention(q, k, v, scale=scale, lse=True)
