"""gate_residual_norm_modulate: a gated residual update and the norm that reads it, in one pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sgl_diffusion.ops import cuda_norms, library, torch_impl, triton_elementwise
from sgl_diffusion.ops.buffers import check_out, into, room
from sgl_diffusion.ops.dispatch import FLOATS, Implementation, Op
from sgl_diffusion.ops.elementwise import refuses_update
from sgl_diffusion.ops.triton_register import implementation

Part = Tensor | None


def _truth(
    x: Tensor,
    y: Tensor,
    gate: Part,
    scale: Part,
    shift: Part,
    weight: Part,
    bias: Part,
    eps: float,
    kind: str,
    out: Part,
) -> tuple[Tensor, Tensor]:
    residual = into(out, torch_impl.gate_residual(x, y, gate))
    normed = torch_impl.norm_modulate(residual, scale, shift, weight, bias, eps, kind, x.dtype)
    return residual, normed


def _native(
    x: Tensor,
    y: Tensor,
    gate: Part,
    scale: Part,
    shift: Part,
    weight: Part,
    bias: Part,
    eps: float,
    kind: str,
    out: Part,
) -> tuple[Tensor, Tensor]:
    residual, normed = room(x, out), room(x)
    torch.ops.sgld.gate_residual_norm_modulate.default(
        x, y, gate, scale, shift, weight, bias, eps, kind == "rms", residual, normed
    )
    return residual, normed


def _refuses(
    x: Tensor,
    y: Tensor,
    gate: Part,
    scale: Part,
    shift: Part,
    weight: Part,
    bias: Part,
    eps: float,
    kind: str,
    out: Part,
) -> str:
    for part in (scale, shift, weight, bias):
        if part is not None and part.dtype not in FLOATS:
            return f"modulation of {part.dtype}"
    if x.ndim > 3 and (scale is not None or shift is not None):
        return f"modulation of {x.ndim} dimensions"
    return refuses_update(x, y, gate, out)


library.fake("gate_residual_norm_modulate")(lambda *args: None)

_gate_residual_norm_modulate = Op(
    "gate_residual_norm_modulate",
    _truth,
    Implementation("cpu", _native, ("cpu",), absent=library.absent, refuses=_refuses),
    Implementation(
        "cuda",
        cuda_norms.gate_residual_norm_modulate,
        ("cuda",),
        sm=range(80, 1000),
        absent=library.without_cuda,
        refuses=_refuses,
    ),
    implementation(triton_elementwise.gate_residual_norm_modulate, triton_elementwise.refuses_gate),
)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: Literal["layer", "rms"] = "layer",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`r = gate_residual(x, y, gate)` and `norm_modulate(r, scale, shift, weight, bias)`.

    Arguments as there; the norm reads r as it was rounded, so this equals the two ops. r is `out`,
    which may be x or y, or a new tensor; the normed tensor is new.
    """
    assert kind in ("layer", "rms"), kind
    assert x.shape == y.shape, f"x {tuple(x.shape)} and y {tuple(y.shape)} differ"
    check_out(x, out)
    return _gate_residual_norm_modulate(x, y, gate, scale, shift, weight, bias, eps, kind, out)
