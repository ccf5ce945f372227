"""The CUDA C++ kernels of gate_residual_norm_modulate and qk_norm_rope, as the truths take them."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion.ops import library
from sgl_diffusion.ops.dispatch import FLOATS

ROPE_ELEMENTS = 16  # of one head, that a thread holds
MOST_THREADS = 1024


@library.fake("cuda_gate_residual_norm_modulate")
@library.fake("cuda_qk_norm_rope")
def _fake(*_: object) -> None:
    """The results are there already."""


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(r = x + y * gate in `out` or new, its modulated norm); the norm reads the rounded r."""
    keep = out is not None and out.is_contiguous()
    residual = out if keep and out is not None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape)
    torch.ops.sgld.cuda_gate_residual_norm_modulate.default(
        x, y, gate, scale, shift, weight, bias, eps, kind == "rms", residual, normed
    )
    return (residual if out is None or keep else out.copy_(residual)), normed


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
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """New tensors, or q and k themselves (in place)."""
    out = (q, k) if in_place else (q.new_empty(q.shape), k.new_empty(k.shape))
    torch.ops.sgld.cuda_qk_norm_rope.default(
        q,
        k,
        weight_q,
        weight_k,
        None if cos is None else cos.contiguous(),
        None if sin is None else sin.contiguous(),
        eps,
        norm == "full",
        rotary == "interleaved",
        *out,
    )
    return out


def refuses_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    rotary: str,
    in_place: bool = False,
) -> str:
    """What `rope_threads` in csrc/include/sgld/cuda_launch.h cannot launch, and unaligned heads."""
    if q.dtype != k.dtype:
        return "q and k of different dtypes"
    lanes, rest = divmod(q.shape[3], ROPE_ELEMENTS)
    if rest or max(q.shape[2], k.shape[2]) * lanes > MOST_THREADS:
        return f"heads {q.shape[2]} x {q.shape[3]}"
    if norm == "head" and (lanes > 32 or lanes & (lanes - 1)):
        return f"a norm over heads of {q.shape[3]}"
    for x in (q, k, weight_q, weight_k):
        if x is not None and not _aligned(x):
            return "heads that do not start at multiples of 16 bytes"
    for angle in (cos, sin):
        if angle is not None and angle.dtype != torch.float32:
            return f"angles of {angle.dtype}"
    return "" if q.dtype in FLOATS else f"heads of {q.dtype}"


def _aligned(x: Tensor) -> bool:
    per_load = 16 // x.element_size()
    outer = all(stride % per_load == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and outer and x.storage_offset() % per_load == 0
