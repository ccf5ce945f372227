"""Attention by the op of this package, with log-sum-exp: native CPU, native CUDA, Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.attention.packed import RowLengths
from sgl_diffusion.ops import library
from sgl_diffusion.ops.attention import head_dim_refused
from sgl_diffusion.ops.cuda_attention import HEAD_DIMS
from sgl_diffusion.ops.dispatch import FLOATS, OPS, sm_of
from sgl_diffusion.ops.validated import result_file

TILES = "amx_bf16"
# A call on a CPU packs its keys and values, which pays from so many queries (docs/measured.md).
LEAST_QUERIES = {torch.float32: 128, torch.float16: 128, torch.bfloat16: 32}


class _GpuRows:
    """The rows of the op that a backend stands for on a GPU, the best first."""

    rows: tuple[str, ...] = ()

    def supports(
        self, device: torch.device, head_dim: int, dtype: torch.dtype, needs_lse: bool
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on cuda, not on {device.type}"
        if head_dim not in HEAD_DIMS:
            return f"head dim {head_dim} is not {' or '.join(map(str, HEAD_DIMS))}"
        if dtype == torch.float32:
            return "on a GPU it computes in bf16 and fp16, not in float32"
        op = OPS.get("attention")
        reasons = [op.implementation(row).unsupported(device, dtype) for row in self.rows]
        return None if "" in reasons else reasons[-1]

    def unproven(self, device: torch.device) -> str | None:
        arch = f"sm_{sm_of(device)}"
        if any(result_file("attention", row, arch) for row in self.rows):
            return None
        return f"it was never validated on {arch}"

    def slower(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def least_queries(self, device: torch.device, dtype: torch.dtype) -> int:
        return 0

    def repeated(self, device: torch.device) -> None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        out: Tensor = self._run(q, k, v, scale, False)[0]
        return out

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The result and its log-sum-exp, fp32 [B, H, S]."""
        out: tuple[Tensor, Tensor] = self._run(q, k, v, scale, True)
        return out

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: RowLengths, *, scale: float | None = None
    ) -> Tensor:
        out: Tensor = self._run(q, k, v, scale, False, *lengths.bounds(q.device))[0]
        return out

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        lse: bool,
        *bounds: Tensor,
    ) -> Any:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return OPS.get("attention").by(self.rows, q, k, v, scale, lse, *(bounds or (None, None)))


class TritonBackend(_GpuRows):
    name = "triton"
    rows = ("triton",)


class NativeBackend(_GpuRows):
    name = "native"
    rows = ("cuda_sm90", "cuda")

    def supports(
        self, device: torch.device, head_dim: int, dtype: torch.dtype, needs_lse: bool
    ) -> str | None:
        if device.type == "cuda":
            return super().supports(device, head_dim, dtype, needs_lse)
        if device.type != "cpu":
            return f"it runs on cpu and cuda, not on {device.type}"
        if dtype not in FLOATS:
            return f"it computes in fp32, bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
        return head_dim_refused(head_dim) or library.absent() or None

    def unproven(self, device: torch.device) -> str | None:
        return super().unproven(device) if device.type == "cuda" else None

    def slower(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return None
        isa = torch.ops.sgld.cpu_isa()
        if isa == "scalar":
            return "sdpa is faster than its scalar kernels"
        if dtype == torch.bfloat16 and isa != TILES and torch.cpu._is_amx_tile_supported():
            return f"sdpa multiplies bf16 in tiles here, which kernels up to {isa} do not"
        return None

    def least_queries(self, device: torch.device, dtype: torch.dtype) -> int:
        return LEAST_QUERIES[dtype] if device.type == "cpu" else 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        if q.is_cuda:
            return super().forward(q, k, v, scale=scale)
        return ops.attention(q, k, v, scale=scale)

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if q.is_cuda:
            return super().forward_lse(q, k, v, scale=scale)
        return ops.attention(q, k, v, scale=scale, lse=True)

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: RowLengths, *, scale: float | None = None
    ) -> Tensor:
        if q.is_cuda:
            return super().forward_packed(q, k, v, lengths, scale=scale)
        queries, keys = lengths.bounds(q.device)
        return ops.attention(q, k, v, scale=scale, cu_seqlens_q=queries, cu_seqlens_k=keys)
