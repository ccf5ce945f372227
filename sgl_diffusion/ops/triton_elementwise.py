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
    from sgl_diffusion.kernels import elementwise, gate_norm, quant, solver_step

    def quant_fake(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale

    def written(*_: object) -> None:
        """The results are there already."""

    return register(
        (
            "gate_residual(Tensor x, Tensor y, Tensor? gate, Tensor(a!) out) -> ()",
            elementwise.gate_residual_launch,
            written,
        ),
        ("gelu_tanh(Tensor x, Tensor(a!) out) -> ()", elementwise.gelu_tanh_launch, written),
        (
            "silu_mul(Tensor gate, Tensor up, Tensor(a!) out) -> ()",
            elementwise.silu_mul_launch,
            written,
        ),
        (
            "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor? gate, Tensor? scale, "
            "Tensor? shift, Tensor? weight, Tensor? bias, float eps, bool rms, "
            "Tensor(a!) residual, Tensor(b!) out) -> ()",
            gate_norm.gate_residual_norm_modulate_launch,
            written,
        ),
        (
            "quant_fp8_rowwise(Tensor x) -> (Tensor, Tensor)",
            quant.quant_fp8_rowwise_launch,
            quant_fake,
        ),
        (
            "cfg_combine_step(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? guidance, "
            "Tensor table, Tensor last, Tensor m0, Tensor m1, Tensor(a!) following, "
            "Tensor(b!) corrected, Tensor(c!) x0) -> ()",
            solver_step.cfg_combine_step_launch,
            written,
        ),
    )


def refuses(x: Tensor, *rest: object) -> str:
    """What these kernels cannot take; a last tensor like x may be the `out` of the caller."""
    for part in rest:
        if isinstance(part, Tensor) and part.dtype not in FLOATS:
            return f"a tensor of {part.dtype}"
    return triton_impl.refuses(x) if x.ndim else "a tensor without dimensions"


def refuses_gate(x: Tensor, y: Tensor, gate: Tensor | None, *rest: object) -> str:
    """As `refuses`, for gate_residual and, with scale and shift next, for its fused form."""
    if x.ndim > 3 and any(part is not None for part in (gate, *rest[:2])):
        return f"modulation of {x.ndim} dimensions"
    return refuses(x, y, gate, *rest)


def _room(x: Tensor, out: Tensor | None) -> Tensor:
    """Contiguous room for a result like x: that of the caller, where it is."""
    return out if out is not None and out.is_contiguous() else x.new_empty(x.shape)


def _done(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None or result is out else out.copy_(result)


def _check(x: Tensor, *modulation: Tensor | None) -> None:
    for part in modulation:
        if part is not None:
            torch_impl.per_token(part, x)  # checks the shape


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor | None = None) -> Tensor:
    _library()
    _check(x, gate)
    result = _room(x, out)
    torch.ops.sgld_triton.gate_residual.default(x, y, gate, result)
    return _done(result, out)


def gelu_tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    _library()
    result = _room(x, out)
    torch.ops.sgld_triton.gelu_tanh.default(x, result)
    return _done(result, out)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    _library()
    result = _room(gate, out)
    torch.ops.sgld_triton.silu_mul.default(gate, up, result)
    return _done(result, out)


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
    _library()
    _check(x, gate, scale, shift)
    residual, normed = _room(x, out), _room(x, None)
    torch.ops.sgld_triton.gate_residual_norm_modulate.default(
        x, y, gate, scale, shift, weight, bias, eps, kind == "rms", residual, normed
    )
    return _done(residual, out), normed


def quant_fp8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as float8_e4m3fn [..., D] and fp32 scales [...]: x is about their product."""
    _library()
    result: tuple[Tensor, Tensor] = torch.ops.sgld_triton.quant_fp8_rowwise.default(x)
    return result


def cfg_combine_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    table: Tensor,
    last: Tensor,
    m0: Tensor,
    m1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next (x, last, m0, m1) of solver states in fp32; contiguous tensors."""
    _library()
    following, corrected, x0 = (_room(x, None) for _ in range(3))
    torch.ops.sgld_triton.cfg_combine_step.default(
        x, v_cond, v_uncond, guidance, table, last, m0, m1, following, corrected, x0
    )
    return following, corrected, x0, m0
