"""Rank 1: one function per op; picks csrc, Triton or torch. For inference: ops have no backward."""

from __future__ import annotations

from sgl_diffusion.ops.attention import attention, attention_merge
from sgl_diffusion.ops.dispatch import OPS, counts, reset_counts, using
from sgl_diffusion.ops.elementwise import gate_residual, gelu_tanh, silu_mul
from sgl_diffusion.ops.linear import linear
from sgl_diffusion.ops.lora import lora_apply, lora_apply_, lora_merge_, lora_unmerge_
from sgl_diffusion.ops.lora_types import LoraDelta, LoraPart, LoraRecord, LoraStack
from sgl_diffusion.ops.norm import norm_modulate
from sgl_diffusion.ops.quant import quant_fp8_rowwise
from sgl_diffusion.ops.residual_norm import gate_residual_norm_modulate
from sgl_diffusion.ops.rope import qk_norm_rope, qk_norm_rope_
from sgl_diffusion.ops.solver_step import cfg_combine_step

__all__ = [
    "LoraDelta",
    "LoraPart",
    "LoraRecord",
    "LoraStack",
    "OPS",
    "cfg_combine_step",
    "attention",
    "attention_merge",
    "counts",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gelu_tanh",
    "linear",
    "lora_apply",
    "lora_apply_",
    "lora_merge_",
    "lora_unmerge_",
    "norm_modulate",
    "qk_norm_rope",
    "qk_norm_rope_",
    "quant_fp8_rowwise",
    "reset_counts",
    "silu_mul",
    "using",
]
