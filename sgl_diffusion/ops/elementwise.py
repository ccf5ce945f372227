"""Ops without a reduction: the gated residual update and the activations."""

from __future__ import annotations

from torch import Tensor

from sgl_diffusion.ops import torch_impl, triton_elementwise
from sgl_diffusion.ops.dispatch import Op
from sgl_diffusion.ops.triton_register import implementation

_gate_residual = Op(
    "gate_residual",
    torch_impl.gate_residual,
    implementation(triton_elementwise.gate_residual, triton_elementwise.refuses_gate),
)
_gelu_tanh = Op(
    "gelu_tanh",
    torch_impl.gelu_tanh,
    implementation(triton_elementwise.gelu_tanh, triton_elementwise.refuses),
)
_silu_mul = Op(
    "silu_mul",
    torch_impl.silu_mul,
    implementation(triton_elementwise.silu_mul, triton_elementwise.refuses),
)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """`x + y * gate`, fp32 inside, rounded once to x's dtype.

    x and y [B, S, D]; gate [B, D], [B, 1, D] (one per batch row), [B, S, D] (one per token), or
    None for a plain sum.
    """
    assert x.shape == y.shape, f"x {tuple(x.shape)} and y {tuple(y.shape)} differ"
    return _gate_residual(x, y, gate)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return _gelu_tanh(x)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, fp32 inside, rounded once: the middle of a SwiGLU MLP."""
    assert gate.shape == up.shape, f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ"
    return _silu_mul(gate, up)
