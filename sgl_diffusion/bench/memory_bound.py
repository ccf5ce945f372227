"""Cases of the ops that memory limits, with the chains as the model libraries write them.

A chain is measured as it is (eager) and by torch.compile; in float64 it is the exact result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.bench.case import COMPILE, EAGER, Bar, Case, Place, Spec, error_of, wide

EPS = 1e-6
WIDTHS = ((4096, 1536), (4096, 3072), (4096, 5120))  # Wan 1.3B, FLUX, Wan 14B
HEADS = ((4096, 12, 128), (4096, 24, 128), (4096, 40, 128))
HIDDEN = ((4096, 8960),)  # the MLP of Wan 1.3B

Chain = Callable[..., Any]


def _case(
    chain: Chain,
    ours: Chain,
    given: tuple[Any, ...],
    moved: int,
    bars: tuple[Bar, Bar] | None = None,
    compared: bool = True,
) -> Case:
    compiled = torch.compile(chain, dynamic=False)
    errors = {}
    if compared:
        exact = first(chain(*(x.double() for x in given)))
        errors = {n: error_of(first(f(*given)), exact) for n, f in (("ours", ours), (EAGER, chain))}
    barred = bars is not None and given[0].dtype == torch.bfloat16 and not given[0].is_cuda
    return Case(
        ours=lambda: ours(*given),
        peers={EAGER: lambda: chain(*given), COMPILE: lambda: compiled(*given)},
        amount=moved,
        copied=given[0],
        errors=errors,
        bars=dict(zip((EAGER, COMPILE), bars or (), strict=True)) if barred else {},
    )


def first(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def norm_modulate(place: Place, sizes: tuple[int, ...]) -> Case:
    def chain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = functional.layer_norm(wide(x), x.shape[-1:], eps=EPS)
        return (y * (1 + scale) + shift).type_as(x)

    tokens, width = sizes
    x = place.normal(1, tokens, width)
    scale, shift = place.wide(2, 1, 1, width)
    return _case(
        chain,
        lambda *given: ops.norm_modulate(*given, eps=EPS),
        (x, scale, shift),
        2 * x.nbytes,
        (Bar(3.5, 5), Bar(2, 3)),
    )


def gate_residual(place: Place, sizes: tuple[int, ...]) -> Case:
    def chain(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return (wide(x) + y * gate).type_as(x)

    tokens, width = sizes
    x, y = place.normal(2, 1, tokens, width)
    gate = place.wide(1, 1, width)
    return _case(chain, ops.gate_residual, (x, y, gate), 3 * x.nbytes)


def gate_residual_norm_modulate(place: Place, sizes: tuple[int, ...]) -> Case:
    def chain(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        x = (wide(x) + y * gate).type_as(x)
        normed = functional.layer_norm(wide(x), x.shape[-1:], eps=EPS)
        return (normed * (1 + scale) + shift).type_as(x), x

    def ours(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        residual, normed = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, eps=EPS)
        return normed, residual

    tokens, width = sizes
    x, y = place.normal(2, 1, tokens, width)
    gate, scale, shift = place.wide(3, 1, 1, width)
    given = (x, y, gate, scale, shift)
    return _case(chain, ours, given, 4 * x.nbytes, (Bar(3.5, 5), Bar(1.5, 2)))


def qk_norm_rope(place: Place, sizes: tuple[int, ...]) -> Case:
    """Wan's: RMSNorm over all heads, rotation of neighbours; q and k of one fused output."""
    tokens, heads, head_dim = sizes

    def one(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = functional.rms_norm(x, x.shape[-1:], weight, EPS).unflatten(-1, (heads, head_dim))
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = a * sin + b * cos
        return out

    def chain(qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k, _ = qkv.chunk(3, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return one(q, weights[0], cos, sin), one(k, weights[1], cos, sin)

    def ours(qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k, _ = (part.unflatten(-1, (heads, head_dim)) for part in qkv.chunk(3, dim=-1))
        return ops.qk_norm_rope(q, k, weights[0], weights[1], cos, sin, eps=EPS)

    width = heads * head_dim
    qkv, weights = place.normal(1, tokens, 3 * width), place.normal(2, width)
    angle = torch.rand(tokens, head_dim // 2, device=place.device) * 100
    given = (qkv, weights, angle.cos(), angle.sin())
    return _case(chain, ours, given, 4 * qkv.nbytes // 3, (Bar(12, 25), Bar(5, 10)))


def gelu_tanh(place: Place, sizes: tuple[int, ...]) -> Case:
    def chain(x: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")

    x = place.normal(*sizes)
    return _case(chain, ops.gelu_tanh, (x,), 2 * x.nbytes, (Bar(4, 6), Bar(4, 5.5)))


def silu_mul(place: Place, sizes: tuple[int, ...]) -> Case:
    def chain(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    gate, up = place.normal(2, *sizes)
    return _case(chain, ops.silu_mul, (gate, up), 3 * gate.nbytes, (Bar(1.8, 2.3), Bar(1.3, 1.7)))


def cfg_combine_step(place: Place, sizes: tuple[int, ...]) -> Case:
    """The state is fp32 whatever the dtype of the velocities."""
    chain = ops.OPS.get("cfg_combine_step").truth.run
    x, last, m0, m1 = place.wide(4, 1, *sizes)
    v, u = place.normal(2, *x.shape)
    guidance, table = torch.tensor([5.0]), torch.rand(1, 9)
    given = (x, v, u, guidance.to(x.device), table.to(x.device), last, m0, m1)
    return _case(chain, ops.cfg_combine_step, given, 7 * x.nbytes + 2 * v.nbytes, compared=False)


def quant_fp8_rowwise(place: Place, sizes: tuple[int, ...]) -> Case:
    chain = ops.OPS.get("quant_fp8_rowwise").truth.run
    x = place.normal(*sizes)
    return _case(chain, ops.quant_fp8_rowwise, (x,), x.nbytes + x.numel(), compared=False)


def attention_merge(place: Place, sizes: tuple[int, ...]) -> Case:
    chain = ops.OPS.get("attention_merge").truth.run
    tokens, heads, head_dim = sizes
    a, b = place.normal(2, 1, tokens, heads, head_dim)
    x, y = place.wide(2, 1, heads, tokens)
    return _case(chain, ops.attention_merge, (a, x, b, y), 3 * a.nbytes)


SPECS = (
    Spec("norm_modulate", norm_modulate, WIDTHS),
    Spec("gate_residual", gate_residual, WIDTHS),
    Spec("gate_residual_norm_modulate", gate_residual_norm_modulate, WIDTHS),
    Spec("qk_norm_rope", qk_norm_rope, HEADS),
    Spec("gelu_tanh", gelu_tanh, HIDDEN),
    Spec("silu_mul", silu_mul, HIDDEN),
    Spec("cfg_combine_step", cfg_combine_step, ((16, 21, 60, 104),)),
    Spec("quant_fp8_rowwise", quant_fp8_rowwise, ((4096, 3072),)),
    Spec("attention_merge", attention_merge, ((4096, 12, 128),)),
)
