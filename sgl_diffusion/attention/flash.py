"""Attention by the optional flash-attn library."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.attention.packed import RowLengths


@functools.cache
def _library() -> Any:
    import flash_attn

    return flash_attn


class FlashBackend:
    name = "flash"

    def supports(
        self, device: torch.device, head_dim: int, dtype: torch.dtype, needs_lse: bool
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on cuda, not on {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in fp16 and bf16, not in {str(dtype).removeprefix('torch.')}"
        if head_dim > 256 or head_dim % 8:
            return f"head dim {head_dim} is not a multiple of 8 up to 256"
        if needs_lse:
            return "it gives no log-sum-exp here"
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed (pip install flash-attn)"
        try:
            _library()
        except (ImportError, OSError):  # built for another torch, a common state of machines
            return "the installed flash-attn cannot be imported by this torch; build it again"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs sm_80 or later"
        return None

    def unproven(self, device: torch.device) -> str | None:
        return None

    def slower(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def least_queries(self, device: torch.device, dtype: torch.dtype) -> int:
        return 0

    def repeated(self, device: torch.device) -> None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        out: Tensor = _library().flash_attn_func(q, k, v, softmax_scale=scale)
        return out

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: RowLengths, *, scale: float | None = None
    ) -> Tensor:
        longest = max(lengths.queries), max(lengths.keys)
        out: Tensor = _library().flash_attn_varlen_func(
            q, k, v, *lengths.bounds(q.device), *longest, softmax_scale=scale
        )
        return out
