"""Every implementation of qk_norm_rope that runs here against float64, on views of a fused QKV."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from tests.refs.norm_modulate import rounding_error
from tests.refs.qk_norm_rope import norm_rope

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = [(1, 1, 1, 2), (5, 123, 3, 40), (2, 17, 2, 128), (1, 33, 5, 64), (2, 3, 2, 96)]


def _check(got: Tensor, want: Tensor) -> None:
    limit = TOLERANCE[got.dtype]
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=limit)
    if got.numel() > 1000 and got.dtype != torch.float32:
        error, ideal = rounding_error(got, want)
        assert error <= 1.02 * ideal, "the result was rounded more than once"


def _angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(tokens, dim // 2) * 100
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotary", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["full", "head"])
def test_values(memory_bound_by: str, norm: Any, rotary: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        torch.manual_seed(1)
        batch, tokens, heads, dim = shape
        q, k, v = torch.randn(batch, tokens, 3, heads, dim).to(dtype).unbind(2)
        width = heads * dim if norm == "full" else dim
        weights = torch.randn(2, width).to(dtype).unbind(0)
        cos, sin = _angles(tokens, dim)
        how: dict[str, Any] = {"eps": 1e-5, "norm": norm, "rotary": rotary}
        kept = [q.clone(), k.clone(), v.clone()]
        got = ops.qk_norm_rope(q, k, *weights, cos, sin, **how)
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))
        for out, x, weight in zip(got, (q, k), weights, strict=True):
            assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
            _check(out, norm_rope(x, weight, cos, sin, **how))
        ops.qk_norm_rope_(q, k, *weights, cos, sin, **how)
        assert torch.equal(q, got[0]) and torch.equal(k, got[1])
        assert torch.equal(v, kept[2]), "the values beside them are not touched"
    assert ops.counts() == {("qk_norm_rope", memory_bound_by): 2 * len(SHAPES)}


def test_parts_can_be_left_out(memory_bound_by: str) -> None:
    for norm, width in (("full", 48), ("head", 24)):
        q, k = torch.randn(2, 9, 2, 24), torch.randn(2, 5, 2, 24)
        weight = torch.randn(width)
        for rotary in ("interleaved", "half"):
            given: dict[str, Any] = {"eps": 1e-6, "norm": norm, "rotary": rotary}
            # No rotation: k may have its own length, as in cross-attention.
            got_q, got_k = ops.qk_norm_rope(q, k, weight, weight, **given)
            _check(got_q, norm_rope(q, weight, None, None, **given))
            _check(got_k, norm_rope(k, weight, None, None, **given))
            # No weight: rotated only.
            cos, sin = _angles(9, 24)
            got_q, got_k = ops.qk_norm_rope(q, q, weight, None, cos, sin, **given)
            _check(got_q, norm_rope(q, weight, cos, sin, **given))
            _check(got_k, norm_rope(q, None, cos, sin, **given))
        # Neither: a copy.
        got_q, got_k = ops.qk_norm_rope(q, k)
        assert torch.equal(got_q, q) and torch.equal(got_k, k)


def test_weights_and_strides_of_their_own(memory_bound_by: str) -> None:
    torch.manual_seed(0)
    transposed = (
        torch.randn(2, 3, 11, 40).bfloat16().transpose(1, 2)
    )  # [B, S, H, d] of [B, H, S, d]
    padded = torch.randn(2, 11, 5, 64).bfloat16()[:, :, 1:4, :40]
    weights = torch.randn(2, 120).unbind(0)
    cos, sin = _angles(22, 40)
    cos, sin = cos[::2], sin[::2]
    given: dict[str, Any] = {"eps": 1e-6, "norm": "full", "rotary": "interleaved"}
    got = ops.qk_norm_rope(transposed, padded, *weights, cos, sin)
    for out, x, weight in zip(got, (transposed, padded), weights, strict=True):
        _check(out, norm_rope(x, weight, cos, sin, **given))
    ops.qk_norm_rope_(transposed, padded, *weights, cos, sin)
    assert torch.equal(transposed, got[0]) and torch.equal(padded, got[1])


def test_large_and_empty(memory_bound_by: str) -> None:
    q, k, _ = torch.randn(1, 2050, 3, 32, 128).bfloat16().unbind(2)
    weight = torch.randn(2, 32 * 128)
    cos, sin = _angles(2050, 128)
    got = ops.qk_norm_rope(q, k, *weight, cos, sin)
    given: dict[str, Any] = {"eps": 1e-6, "norm": "full", "rotary": "interleaved"}
    _check(got[1], norm_rope(k, weight[1], cos, sin, **given))
    empty = torch.empty(2, 0, 3, 8)
    got = ops.qk_norm_rope(empty, empty, torch.ones(24), torch.ones(24))
    assert got[0].shape == got[1].shape == empty.shape


def test_threads_do_not_change_a_bit(memory_bound_by: str) -> None:
    q, k, _ = torch.randn(2, 700, 3, 4, 40).bfloat16().unbind(2)
    cos, sin = _angles(700, 40)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.qk_norm_rope(q, k, torch.ones(160), None, cos, sin))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_heads_that_are_not_dense_fall_back_to_torch() -> None:
    q = torch.randn(1, 4, 2, 16)[..., ::2]
    ops.reset_counts()
    got, _ = ops.qk_norm_rope(q, q, torch.ones(16), None)
    _check(got, norm_rope(q, torch.ones(16), None, None, eps=1e-6, norm="full", rotary="half"))
    assert ops.counts() == {("qk_norm_rope", "torch"): 1}
    with ops.using(qk_norm_rope="cpu"), pytest.raises(ConfigError, match="not dense"):
        ops.qk_norm_rope(q, q)


def test_wrong_calls_are_errors(memory_bound_by: str) -> None:
    q, table = torch.randn(1, 4, 2, 8), torch.randn(4, 4)
    for call in (ops.qk_norm_rope, ops.qk_norm_rope_):
        with pytest.raises(AssertionError, match=r"needs weights \[16\]"):
            call(q, q, torch.ones(8))
        with pytest.raises(AssertionError, match=r"needs weights \[8\]"):
            call(q, q, torch.ones(16), norm="head")
        with pytest.raises(AssertionError, match="come together"):
            call(q, q, cos=table)
        with pytest.raises(AssertionError, match=r"must be \[S, d/2\] = \(4, 4\)"):
            call(q, q, cos=table[:3], sin=table[:3])
