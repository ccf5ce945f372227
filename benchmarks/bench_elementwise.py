"""The memory-bound ops on the CPU: ours, torch eager and torch.compile, and a plain copy.

    python benchmarks/bench_elementwise.py [--threads N] [--save]

bf16, one DiT block's shapes at 4096 tokens; gates, scales and angles in fp32. Chains are written as
the model libraries write them. GB/s counts every input read once and every result written once,
the least there is; the error is relative to float64. The last rows have no bf16 chain to compare
with: the guided solver step of 16 latent channels of 21x60x104 frames, the fp8 quantisation, and a
linear layer in fp32 (ours is oneDNN on plain weights there).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from sgl_diffusion import ops
from tests.refs import elementwise as reference
from tests.refs.linear import linear as linear_reference
from tests.refs.qk_norm_rope import norm_rope
from tests.refs.residual_norm import gate_residual_norm_modulate as residual_reference
from tests.refs.solver_step import cfg_combine_step as solver_reference

TOKENS = 4096
WIDTHS = (1536, 3072, 5120)  # Wan 1.3B, FLUX, Wan 14B
HEADS, HEAD_DIM = (12, 24, 40), 128
HIDDEN = 8960  # the MLP of Wan 1.3B
EPS = 1e-6

Chain = Callable[..., Any]


def measure(
    op: str,
    shape: str,
    given: tuple[Any, ...],
    chain: Chain,
    ours: Chain,
    exact: Tensor,
    moved: int,
    repeats: int,
) -> dict[str, Any]:
    """One row: `chain` eager and compiled, and `ours`, on the same tensors."""
    torch._dynamo.reset()
    compiled = torch.compile(chain, dynamic=False)
    ops.reset_counts()
    got = _first(ours(*given))
    ((_, implementation),) = ops.counts()
    eager = _first(chain(*given))
    seconds = harness.compare(
        {
            "eager": lambda: chain(*given),
            "compile": lambda: compiled(*given),
            "ours": lambda: ours(*given),
            "copy": harness.copy_of(given[0]),
        },
        repeats,
    )
    copied = 2 * given[0].numel() * given[0].element_size()
    return {
        "op": op,
        "shape": shape,
        "implementation": implementation,
        **{f"{name}_ms": value * 1e3 for name, value in seconds.items()},
        "vs_eager": seconds["eager"] / seconds["ours"],
        "vs_compile": seconds["compile"] / seconds["ours"],
        "GB/s": moved / seconds["ours"] / 1e9,
        "copy_GB/s": copied / seconds["copy"] / 1e9,
        "error": _error(got, exact),
        "eager_error": _error(eager, exact),
    }


def _first(result: Any) -> Tensor:
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


def _error(got: Tensor, exact: Tensor) -> float | None:
    if got.dtype == torch.float8_e4m3fn:
        return None
    return ((got.double() - exact).norm() / exact.norm()).item()


def gate_residual(width: int, repeats: int) -> dict[str, Any]:
    def chain(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return (x.float() + y * gate).type_as(x)

    x, y = torch.randn(2, 1, TOKENS, width).bfloat16()
    gate = torch.randn(1, 1, width)
    exact = reference.gate_residual(x, y, gate)
    shape, moved = f"{TOKENS}x{width}", 3 * x.nbytes
    return measure(
        "gate_residual", shape, (x, y, gate), chain, ops.gate_residual, exact, moved, repeats
    )


def gate_residual_norm_modulate(width: int, repeats: int) -> dict[str, Any]:
    def chain(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        x = (x.float() + y * gate).type_as(x)
        normed = functional.layer_norm(x.float(), x.shape[-1:], eps=EPS)
        return (normed * (1 + scale) + shift).type_as(x), x

    def ours(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        residual, normed = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, eps=EPS)
        return normed, residual

    x, y = torch.randn(2, 1, TOKENS, width).bfloat16()
    gate, scale, shift = torch.randn(3, 1, 1, width)
    given = (x, y, gate, scale, shift)
    exact_residual = reference.gate_residual(x, y, gate)
    _, exact = residual_reference(x, y, gate, exact_residual, scale=scale, shift=shift, eps=EPS)
    shape, moved = f"{TOKENS}x{width}", 4 * x.nbytes
    return measure("gate_residual_norm_modulate", shape, given, chain, ours, exact, moved, repeats)


def qk_norm_rope(heads: int, repeats: int) -> dict[str, Any]:
    """Wan's: RMSNorm over all heads, rotation of neighbours; q and k of one fused output."""

    def one(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = functional.rms_norm(x, x.shape[-1:], weight, EPS).unflatten(-1, (heads, HEAD_DIM))
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
        q, k, _ = (part.unflatten(-1, (heads, HEAD_DIM)) for part in qkv.chunk(3, dim=-1))
        return ops.qk_norm_rope(q, k, weights[0], weights[1], cos, sin, eps=EPS)

    width = heads * HEAD_DIM
    qkv, weights = torch.randn(1, TOKENS, 3 * width).bfloat16(), torch.randn(2, width).bfloat16()
    angle = torch.rand(TOKENS, HEAD_DIM // 2) * 100
    cos, sin = angle.cos(), angle.sin()
    q = qkv[..., :width].unflatten(-1, (heads, HEAD_DIM))
    exact = norm_rope(q, weights[0], cos, sin, eps=EPS, norm="full", rotary="interleaved")
    shape, moved = f"{TOKENS}x{heads}x{HEAD_DIM}", 4 * qkv.nbytes // 3
    given = (qkv, weights, cos, sin)
    return measure("qk_norm_rope", shape, given, chain, ours, exact, moved, repeats)


def gelu_tanh(repeats: int) -> dict[str, Any]:
    def chain(x: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")

    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    exact = reference.gelu_tanh(x)
    shape = f"{TOKENS}x{HIDDEN}"
    return measure("gelu_tanh", shape, (x,), chain, ops.gelu_tanh, exact, 2 * x.nbytes, repeats)


def silu_mul(repeats: int) -> dict[str, Any]:
    def chain(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    gate, up = torch.randn(2, TOKENS, HIDDEN).bfloat16()
    exact = reference.silu_mul(gate, up)
    shape, moved = f"{TOKENS}x{HIDDEN}", 3 * gate.nbytes
    return measure("silu_mul", shape, (gate, up), chain, ops.silu_mul, exact, moved, repeats)


def cfg_combine_step(repeats: int) -> dict[str, Any]:
    chain = ops.OPS.get("cfg_combine_step").truth.run
    x, last, m0, m1 = torch.randn(4, 1, 16, 21, 60, 104)
    v, u = torch.randn(2, *x.shape).bfloat16()
    given = (x, v, u, torch.tensor([5.0]), torch.rand(1, 9), last, m0, m1)
    exact = solver_reference(*given)[0]
    moved = 7 * x.nbytes + 2 * v.nbytes
    return measure(
        "cfg_combine_step",
        "16x21x60x104",
        given,
        chain,
        ops.cfg_combine_step,
        exact,
        moved,
        repeats,
    )


def quant_fp8_rowwise(repeats: int) -> dict[str, Any]:
    chain = ops.OPS.get("quant_fp8_rowwise").truth.run
    x = torch.randn(TOKENS, 3072).bfloat16()
    shape, moved = f"{TOKENS}x3072", x.nbytes + x.numel()
    return measure(
        "quant_fp8_rowwise", shape, (x,), chain, ops.quant_fp8_rowwise, x.double(), moved, repeats
    )


def linear(repeats: int) -> dict[str, Any]:
    x, weight, bias = torch.randn(1024, 1536), torch.randn(1536, 1536), torch.randn(1536)
    given, exact = (x, weight, bias), linear_reference(x, weight, bias)
    moved = x.nbytes + weight.nbytes + exact.numel() * 4
    with ops.using(linear="onednn"):
        return measure(
            "linear fp32",
            "1024x1536x1536",
            given,
            functional.linear,
            ops.linear,
            exact,
            moved,
            repeats,
        )


def main() -> None:
    options = harness.arguments(__doc__)
    torch.set_num_threads(options.threads)
    harness.keep_freed_memory()
    repeats = options.repeats
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        rows += [gate_residual(width, repeats) for width in WIDTHS]
        rows += [gate_residual_norm_modulate(width, repeats) for width in WIDTHS]
        rows += [qk_norm_rope(heads, repeats) for heads in HEADS]
        rows += [gelu_tanh(repeats), silu_mul(repeats), cfg_combine_step(repeats)]
        rows += [quant_fp8_rowwise(repeats), linear(repeats)]
    harness.report("elementwise", rows, save=options.save)


if __name__ == "__main__":
    main()
