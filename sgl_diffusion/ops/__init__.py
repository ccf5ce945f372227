"""Rank 1: one function per op; picks csrc, Triton or torch. For inference: ops have no backward."""

from __future__ import annotations

from sgl_diffusion.ops.attention import attention, attention_merge
from sgl_diffusion.ops.dispatch import OPS, counts, reset_counts, using
from sgl_diffusion.ops.elementwise import gate_residual, gelu_tanh, silu_mul
from sgl_diffusion.ops.norm import norm_modulate
from sgl_diffusion.ops.rope import qk_norm_rope

__all__ = [
    "OPS",
    "attention",
    "attention_merge",
    "counts",
    "gate_residual",
    "gelu_tanh",
    "norm_modulate",
    "qk_norm_rope",
    "reset_counts",
    "silu_mul",
    "using",
]
