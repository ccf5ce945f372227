"""The elementwise ops against float64."""

from __future__ import annotations

import pytest
import torch

from sgl_diffusion import ops
from tests.refs import elementwise as reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [None, (5, 40), (5, 1, 40), (5, 123, 40)])
def test_gate_residual(rows: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 5, 123, 40).to(dtype)
    gate = None if rows is None else torch.randn(rows)
    got = ops.gate_residual(x, y, gate)
    assert got.dtype == dtype
    want = reference.gate_residual(x, y, gate)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_gate_residual_refuses_wrong_shapes() -> None:
    x = torch.randn(2, 3, 8)
    for size in ((3, 8), (2, 2, 8), (2, 7)):
        with pytest.raises(AssertionError, match="does not fit"):
            ops.gate_residual(x, x, torch.randn(size))
    with pytest.raises(AssertionError, match="differ"):
        ops.gate_residual(x, x[:1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_activations(dtype: torch.dtype) -> None:
    x = torch.linspace(-12, 12, 1001).to(dtype).view(7, 143)
    up = torch.randn(7, 143).to(dtype)
    for got, want in (
        (ops.gelu_tanh(x), reference.gelu_tanh(x)),
        (ops.silu_mul(x, up), reference.silu_mul(x, up)),
        (ops.silu_mul(x[:, ::3], up[:, ::3]), reference.silu_mul(x, up)[:, ::3]),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
