"""Ops without a reduction: the gated residual update and the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion.ops import library, torch_impl, triton_elementwise
from sgl_diffusion.ops.buffers import check_out, has_rows, into, room
from sgl_diffusion.ops.dispatch import FLOATS, Implementation, Op
from sgl_diffusion.ops.triton_register import implementation


def refuses_update(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor | None) -> str:
    """What the native kernels ask of a gated residual update."""
    if y.dtype != x.dtype:
        return f"an update of {y.dtype}"
    if gate is not None and gate.dtype not in FLOATS:
        return f"a gate of {gate.dtype}"
    if gate is not None and x.ndim not in (2, 3):
        return f"a gate of {x.ndim} dimensions"
    return "" if x.ndim > 0 and has_rows(out) else "strides that are no rows"


def _update(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor | None) -> Tensor:
    result = room(x, out)
    torch.ops.sgld.gate_residual.default(x, y, gate, result)
    return result


def _gelu(x: Tensor, out: Tensor | None) -> Tensor:
    result = room(x, out)
    torch.ops.sgld.gelu_tanh.default(x, result)
    return result


def _silu(gate: Tensor, up: Tensor, out: Tensor | None) -> Tensor:
    result = room(gate, out)
    torch.ops.sgld.silu_mul.default(gate, up, result)
    return result


def _refuses_silu(gate: Tensor, up: Tensor, out: Tensor | None) -> str:
    if up.dtype != gate.dtype:
        return f"a second factor of {up.dtype}"
    return "" if has_rows(gate, up, out) else "strides that are no rows"


for _name in ("gate_residual", "gelu_tanh", "silu_mul"):
    library.fake(_name)(lambda *args: None)

_gate_residual = Op(
    "gate_residual",
    lambda x, y, gate, out: into(out, torch_impl.gate_residual(x, y, gate)),
    Implementation("cpu", _update, ("cpu",), absent=library.absent, refuses=refuses_update),
    implementation(triton_elementwise.gate_residual, triton_elementwise.refuses_gate),
)
_gelu_tanh = Op(
    "gelu_tanh",
    lambda x, out: into(out, torch_impl.gelu_tanh(x)),
    Implementation(
        "cpu",
        _gelu,
        ("cpu",),
        absent=library.absent,
        refuses=lambda x, out: "" if has_rows(x, out) else "strides that are no rows",
    ),
    implementation(triton_elementwise.gelu_tanh, triton_elementwise.refuses),
)
_silu_mul = Op(
    "silu_mul",
    lambda gate, up, out: into(out, torch_impl.silu_mul(gate, up)),
    Implementation("cpu", _silu, ("cpu",), absent=library.absent, refuses=_refuses_silu),
    implementation(triton_elementwise.silu_mul, triton_elementwise.refuses),
)


def gate_residual(
    x: Tensor, y: Tensor, gate: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """`x + y * gate`, fp32 inside, rounded once to x's dtype.

    x and y [B, S, D]; gate [B, D], [B, 1, D] (one per batch row), [B, S, D] (one per token), or
    None for a plain sum. The result is `out`, which may be x or y, or a new tensor.
    """
    assert x.shape == y.shape, f"x {tuple(x.shape)} and y {tuple(y.shape)} differ"
    check_out(x, out)
    return _gate_residual(x, y, gate, out)


def gelu_tanh(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """GELU in its tanh approximation. The result is `out`, which may be x, or a new tensor."""
    check_out(x, out)
    return _gelu_tanh(x, out)


def silu_mul(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, fp32 inside, rounded once: the middle of a SwiGLU MLP.

    The result is `out`, which may be one of the inputs, or a new tensor.
    """
    assert gate.shape == up.shape, f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ"
    check_out(gate, out)
    return _silu_mul(gate, up, out)
