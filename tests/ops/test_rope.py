"""qk_norm_rope against float64, on views of one fused QKV output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgl_diffusion import ops
from tests.refs.qk_norm_rope import norm_rope

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotary", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["full", "head"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (5, 123, 3, 40), (2, 17, 2, 128)])
def test_values(shape: tuple[int, ...], norm: Any, rotary: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    batch, tokens, heads, dim = shape
    q, k, _ = torch.randn(batch, tokens, 3, heads, dim).to(dtype).unbind(2)
    width = heads * dim if norm == "full" else dim
    weight_q, weight_k = torch.randn(2, width).to(dtype)
    angle = torch.rand(tokens, dim // 2) * 100
    cos, sin = angle.cos(), angle.sin()
    got = ops.qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps=1e-5, norm=norm, rotary=rotary)
    for out, x, weight in zip(got, (q, k), (weight_q, weight_k), strict=True):
        assert out.dtype == dtype and out.shape == shape
        want = norm_rope(x, weight, cos, sin, eps=1e-5, norm=norm, rotary=rotary)
        torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def _same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


def test_parts_can_be_left_out() -> None:
    q, k = torch.randn(2, 9, 2, 8), torch.randn(2, 5, 2, 8)
    weight = torch.randn(16)
    given: dict[str, Any] = {"eps": 1e-6, "norm": "full", "rotary": "interleaved"}
    # No rotation: k may have its own length, as in cross-attention.
    got_q, got_k = ops.qk_norm_rope(q, k, weight, weight)
    _same(got_q, norm_rope(q, weight, None, None, **given))
    _same(got_k, norm_rope(k, weight, None, None, **given))
    # No weight: rotated only.
    angle = torch.rand(9, 4)
    cos, sin = angle.cos(), angle.sin()
    got_q, got_k = ops.qk_norm_rope(q, q, weight, None, cos, sin)
    _same(got_q, norm_rope(q, weight, cos, sin, **given))
    _same(got_k, norm_rope(q, None, cos, sin, **given))


def test_wrong_calls_are_errors() -> None:
    q, table = torch.randn(1, 4, 2, 8), torch.randn(4, 4)
    with pytest.raises(AssertionError, match=r"needs weights \[16\]"):
        ops.qk_norm_rope(q, q, torch.ones(8))
    with pytest.raises(AssertionError, match=r"needs weights \[8\]"):
        ops.qk_norm_rope(q, q, torch.ones(16), norm="head")
    with pytest.raises(AssertionError, match="come together"):
        ops.qk_norm_rope(q, q, cos=table)
    with pytest.raises(AssertionError, match=r"must be \[S, d/2\] = \(4, 4\)"):
        ops.qk_norm_rope(q, q, cos=table[:3], sin=table[:3])
