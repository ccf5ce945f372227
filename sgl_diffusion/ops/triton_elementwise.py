"""The memory-bound Triton kernels beside norm_modulate, with the arguments of the torch truths."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sgl_diffusion.ops import torch_impl, triton_impl
from sgl_diffusion.ops.dispatch import FLOATS
from sgl_diffusion.ops.triton_register import register


@functools.cache
def _library() -> torch.library.Library:
    from sgl_diffusion.kernels import elementwise, gate_norm, quant

    def gate_norm_fake(
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)

    def quant_fake(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale

    return register(
        (
            "gate_residual(Tensor x, Tensor y, Tensor? gate) -> Tensor",
            elementwise.gate_residual_launch,
            lambda x, y, gate: x.new_empty(x.shape),
        ),
        (
            "gelu_tanh(Tensor x) -> Tensor",
            elementwise.gelu_tanh_launch,
            lambda x: x.new_empty(x.shape),
        ),
        (
            "silu_mul(Tensor gate, Tensor up) -> Tensor",
            elementwise.silu_mul_launch,
            lambda gate, up: gate.new_empty(gate.shape),
        ),
        (
            "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor? gate, Tensor? scale, "
            "Tensor? shift, Tensor? weight, Tensor? bias, float eps, bool rms, "
            "ScalarType out_dtype) -> (Tensor, Tensor)",
            gate_norm.gate_residual_norm_modulate_launch,
            gate_norm_fake,
        ),
        (
            "quant_fp8_rowwise(Tensor x) -> (Tensor, Tensor)",
            quant.quant_fp8_rowwise_launch,
            quant_fake,
        ),
    )


def refuses(x: Tensor, *rest: object) -> str:
    """What these kernels cannot take."""
    for part in rest:
        if isinstance(part, Tensor) and part.dtype not in FLOATS:
            return f"a tensor of {part.dtype}"
    return triton_impl.refuses(x) if x.ndim else "a tensor without dimensions"


def refuses_gate(x: Tensor, y: Tensor, gate: Tensor | None, *rest: object) -> str:
    """As `refuses`, for gate_residual and, with scale and shift next, for its fused form."""
    if x.ndim > 3 and any(part is not None for part in (gate, *rest[:2])):
        return f"modulation of {x.ndim} dimensions"
    return refuses(x, y, gate, *rest)


def _check(x: Tensor, *modulation: Tensor | None) -> None:
    for part in modulation:
        if part is not None:
            torch_impl.per_token(part, x)  # checks the shape


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    _library()
    _check(x, gate)
    out: Tensor = torch.ops.sgld_triton.gate_residual.default(x, y, gate)
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    _library()
    out: Tensor = torch.ops.sgld_triton.gelu_tanh.default(x)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    _library()
    out: Tensor = torch.ops.sgld_triton.silu_mul.default(gate, up)
    return out


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
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(x + y * gate, its modulated norm); the second is computed from the rounded first."""
    _library()
    _check(x, gate, scale, shift)
    out: tuple[Tensor, Tensor] = torch.ops.sgld_triton.gate_residual_norm_modulate.default(
        x, y, gate, scale, shift, weight, bias, eps, kind == "rms", out_dtype
    )
    return out


def quant_fp8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn values, fp32 scale of each row [..., 1])."""
    _library()
    out: tuple[Tensor, Tensor] = torch.ops.sgld_triton.quant_fp8_rowwise.default(x)
    return out
