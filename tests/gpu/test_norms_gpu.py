"""The memory-bound ops on a GPU against float64, by every implementation that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.ops import cuda_norms, library, triton_elementwise, triton_rope
from tests.gpu.common import DTYPES, close, fresh
from tests.refs import elementwise
from tests.refs.norm_modulate import norm_modulate
from tests.refs.qk_norm_rope import norm_rope

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (5, 123, 40), (2, 3, 1030), (1, 77, 3072), (2, 33, 5120), (1, 3, 8960)]
GATE_NORM: dict[str, Callable[..., Any]] = {
    "cuda": cuda_norms.gate_residual_norm_modulate,
    "triton": triton_elementwise.gate_residual_norm_modulate,
}
ROPE: dict[str, Callable[..., Any]] = {
    "cuda": cuda_norms.qk_norm_rope,
    "triton": triton_rope.qk_norm_rope,
}


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    assert not library.without_cuda(), library.without_cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_norm_modulate(
    implementation: str, kind: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, (scale, shift) = fresh(*shape, dtype=dtype), fresh(2, shape[0], 1, shape[2]).float()
    with ops.using(norm_modulate=implementation):
        got = ops.norm_modulate(x, scale, shift, kind=kind)
    close(got, norm_modulate(x, scale, shift, kind=kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("implementation", GATE_NORM)
def test_gate_residual_norm_modulate(
    implementation: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, y = fresh(2, *shape, dtype=dtype)
    gate, scale, shift = fresh(3, shape[0], 1, shape[2]).float()
    weight, bias = fresh(2, shape[2])
    residual, got = GATE_NORM[implementation](x, y, gate, scale, shift, weight, bias, 1e-6, kind)
    close(residual, elementwise.gate_residual(x, y, gate))
    close(got, norm_modulate(residual, scale, shift, weight, bias, kind=kind))


@pytest.mark.parametrize("implementation", GATE_NORM)
def test_gate_residual_norm_modulate_by_token_and_strided(implementation: str) -> None:
    x, y, _ = fresh(2, 65, 3, 256).unbind(2)
    gate, scale, shift = fresh(2, 65, 6, 256).unbind(2)[1:4]
    residual, got = GATE_NORM[implementation](x, y, gate, scale, shift, None, None, 1e-6, "layer")
    close(residual, elementwise.gate_residual(x, y, gate))
    close(got, norm_modulate(residual, scale, shift))
    residual, got = GATE_NORM[implementation](x, y, None, None, None, None, None, 1e-6, "rms")
    close(residual, elementwise.gate_residual(x, y))
    close(got, norm_modulate(residual, kind="rms"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["full", "head"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (5, 123, 3, 40), (2, 77, 40, 128), (1, 9, 24, 96)]
)
@pytest.mark.parametrize("implementation", ROPE)
def test_qk_norm_rope(
    implementation: str, shape: tuple[int, ...], norm: str, rotary: str, dtype: torch.dtype
) -> None:
    batch, tokens, heads, dim = shape
    q, k, _ = fresh(batch, tokens, 3, heads, dim, dtype=dtype).unbind(2)
    weights = fresh(2, heads * dim if norm == "full" else dim, dtype=dtype)
    angle = torch.rand(tokens, dim // 2, device="cuda") * 100
    cos, sin = angle.cos(), angle.sin()
    given: dict[str, Any] = {"eps": 1e-6, "norm": norm, "rotary": rotary}
    rest = (*weights, cos, sin, 1e-6, norm, rotary)
    if implementation == "cuda" and cuda_norms.refuses_rope(q, k, *rest):
        pytest.skip(cuda_norms.refuses_rope(q, k, *rest))
    got = ROPE[implementation](q, k, *rest)
    for out, x, weight in zip(got, (q, k), weights, strict=True):
        close(out, norm_rope(x, weight, cos, sin, **given), steps=2)
    got = ROPE[implementation](q, k[:, :1], weights[0], None, None, None, 1e-6, norm, rotary)
    close(got[0], norm_rope(q, weights[0], None, None, **given), steps=2)
    assert torch.equal(got[1], k[:, :1])


@pytest.mark.parametrize("implementation", ROPE)
def test_qk_norm_rope_in_place(implementation: str) -> None:
    fused = fresh(2, 77, 3, 24, 128)
    before = fused.clone()
    q, k, v = fused.unbind(2)
    weights = fresh(2, 128)
    angle = torch.rand(77, 64, device="cuda")
    rest = (*weights, angle.cos(), angle.sin(), 1e-6, "head", "half")
    want = ROPE[implementation](q, k, *rest)
    ROPE[implementation](q, k, *rest, in_place=True)
    assert torch.equal(q, want[0]) and torch.equal(k, want[1])
    assert torch.equal(v, before[:, :, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 123), (3, 1030), (2, 65, 8960)])
def test_elementwise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = fresh(2, *shape, dtype=dtype, size=4)
    with ops.using(gelu_tanh="triton", silu_mul="triton", gate_residual="triton"):
        close(ops.gelu_tanh(x), elementwise.gelu_tanh(x))
        close(ops.silu_mul(x, y), elementwise.silu_mul(x, y))
        close(ops.gate_residual(x, y), elementwise.gate_residual(x, y))
        halves = fresh(7, 2 * 40, dtype=dtype).chunk(2, -1)
        close(ops.silu_mul(*halves), elementwise.silu_mul(*halves))


@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 65, 5120)])
def test_quant_fp8_rowwise(shape: tuple[int, ...]) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3 came with sm_89")
    x = fresh(*shape, size=7)
    x.view(-1, shape[-1])[-1] = 0
    value, scale = triton_elementwise.quant_fp8_rowwise(x)
    top = x.float().abs().amax(-1)
    torch.testing.assert_close(scale, (top / 448).clamp_min(2.0**-100))
    want = (x.float() * (1 / scale)[..., None]).to(torch.float8_e4m3fn)
    # A quotient on a tie may round either way by the order of the division.
    differ = value.view(torch.uint8) != want.view(torch.uint8)
    assert differ.float().mean() < 1e-3
    torch.testing.assert_close(value.float(), want.float(), rtol=2.0**-3, atol=2.0**-9)
