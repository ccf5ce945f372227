"""Every implementation of the elementwise ops that runs here against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from tests.refs import elementwise as reference
from tests.refs.norm_modulate import rounding_error

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = [(1, 1), (1, 7), (3, 1, 33), (5, 123, 40), (2, 31, 128), (2, 9, 1536), (2, 3, 2, 5)]


def _check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    limit = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=limit)
    if got.numel() > 1000 and got.dtype != torch.float32:
        error, ideal = rounding_error(got, want)
        assert error <= 1.02 * ideal, "the result was rounded more than once"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ["none", "batch", "batch_kept", "token", "shared"])
def test_gate_residual(memory_bound_by: str, rows: str, dtype: torch.dtype) -> None:
    for b, s, d in ((1, 1, 1), (5, 123, 40), (2, 9, 1536), (3, 2, 65)):
        torch.manual_seed(d)
        x, y = torch.randn(2, b, s, d).to(dtype)
        sizes = {"batch": (b, d), "batch_kept": (b, 1, d), "token": (b, s, d), "shared": (d,)}
        for gate_dtype in (torch.float32, dtype):
            gate = torch.randn(sizes[rows]).to(gate_dtype) if rows != "none" else None
            got = ops.gate_residual(x, y, gate)
            assert got.dtype == dtype
            _check(got, reference.gate_residual(x, y, gate))
    assert ops.counts() == {("gate_residual", memory_bound_by): 8}


def test_gate_residual_of_strided_inputs_and_in_place(memory_bound_by: str) -> None:
    torch.manual_seed(0)
    fused = torch.randn(2, 11, 3 * 48)
    x, y, gate = fused[..., :48], fused[..., 48:96], torch.randn(2, 6, 48).unbind(1)[2]
    want = reference.gate_residual(x, y, gate)
    _check(ops.gate_residual(x, y, gate), want)
    others = fused[..., 48:].clone()
    assert ops.gate_residual(x, y, gate, out=x) is x
    _check(x, want)
    assert torch.equal(fused[..., 48:], others), "only x was written to"
    sparse = torch.randn(2, 48, 11).transpose(1, 2)
    _check(ops.gate_residual(sparse, y, gate), reference.gate_residual(sparse, y, gate))
    deep = torch.randn(2, 3, 4, 5)
    _check(ops.gate_residual(deep, deep, out=deep.clone()), 2 * deep.double())
    large = torch.randn(2, 2050, 2112, dtype=torch.bfloat16)
    _check(ops.gate_residual(large, large), 2 * large.double())


def test_gate_residual_refuses_wrong_shapes(memory_bound_by: str) -> None:
    x = torch.randn(2, 3, 8)
    for size in ((3, 8), (2, 2, 8), (2, 7)):
        with pytest.raises((AssertionError, ValueError), match=r"does not fit|gate \["):
            ops.gate_residual(x, x, torch.randn(size))
    with pytest.raises(AssertionError, match="differ"):
        ops.gate_residual(x, x[:1])
    with pytest.raises(AssertionError, match="must be like the input"):
        ops.gate_residual(x, x, out=x.bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_activations(memory_bound_by: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in [*SHAPES, (3, 8192 + 7)]:
        x, up = (torch.randn(2, *shape) * 3).to(dtype)
        gelu, silu = reference.gelu_tanh(x), reference.silu_mul(x, up)
        _check(ops.gelu_tanh(x), gelu)
        _check(ops.silu_mul(x, up), silu)
        in_place = x.clone()
        assert ops.gelu_tanh(in_place, out=in_place) is in_place
        _check(in_place, gelu)
        in_place = up.clone()
        assert ops.silu_mul(x, in_place, out=in_place) is in_place
        _check(in_place, silu)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_activations_over_the_whole_range(memory_bound_by: str, dtype: torch.dtype) -> None:
    """Far from zero they are the identity or zero, never NaN; NaN stays NaN."""
    x = torch.linspace(-12, 12, 1001).to(dtype)
    _check(ops.gelu_tanh(x), reference.gelu_tanh(x))
    _check(ops.silu_mul(x, torch.ones_like(x)), reference.silu_mul(x, torch.ones_like(x)))
    far = torch.tensor([-6e4, -3e3, -150.0, -90.0, 90.0, 150.0, 3e3, 6e4]).to(dtype)
    for got in (ops.gelu_tanh(far), ops.silu_mul(far, torch.ones_like(far))):
        assert got[:4].float().abs().max() < 1e-30
        torch.testing.assert_close(got[4:], far[4:], rtol=3e-7, atol=0)
    bad = torch.tensor([1.0, float("nan"), 2.0]).to(dtype)
    for got in (ops.gelu_tanh(bad), ops.silu_mul(bad, bad)):
        assert got.isnan().tolist() == [False, True, False]


def test_activations_of_fused_outputs(memory_bound_by: str) -> None:
    gate, up = torch.randn(2, 7, 2 * 48).chunk(2, dim=-1)
    _check(ops.silu_mul(gate, up), reference.silu_mul(gate, up))
    _check(ops.gelu_tanh(gate), reference.gelu_tanh(gate))
    kept = up.clone()
    want = reference.gelu_tanh(gate)
    _check(ops.gelu_tanh(gate, out=gate), want)
    assert torch.equal(up, kept)


def test_large_results_and_empty_ones(memory_bound_by: str) -> None:
    large = torch.randn(2050, 4101, dtype=torch.bfloat16)
    _check(ops.gelu_tanh(large), reference.gelu_tanh(large))
    for shape in ((2, 0, 64), (0, 5, 64), (0,)):
        x = torch.empty(shape, dtype=torch.bfloat16)
        results = [ops.gelu_tanh(x), ops.silu_mul(x, x), ops.gate_residual(x, x)]
        assert all(result.shape == x.shape for result in results)


def test_other_strides_fall_back_to_torch_or_are_an_error_by_name() -> None:
    x = torch.randn(7, 143)[:, ::3]
    ops.reset_counts()
    _check(ops.gelu_tanh(x), reference.gelu_tanh(x))
    _check(ops.silu_mul(x, x), reference.silu_mul(x, x))
    assert ops.counts() == {("gelu_tanh", "torch"): 1, ("silu_mul", "torch"): 1}
    with ops.using(gelu_tanh="cpu"), pytest.raises(ConfigError, match="strides"):
        ops.gelu_tanh(x)
