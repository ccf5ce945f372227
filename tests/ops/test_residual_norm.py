"""Every implementation of gate_residual_norm_modulate that runs here against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from tests.refs.norm_modulate import rounding_error
from tests.refs.residual_norm import gate_residual_norm_modulate as reference

SHAPES = [(1, 1, 1), (3, 1, 33), (5, 123, 40), (2, 31, 128), (2, 9, 1536)]
LIMITS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def _check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for one, exact in zip(got, want, strict=True):
        limit = LIMITS[one.dtype]
        assert one.shape == exact.shape
        torch.testing.assert_close(one.double(), exact, rtol=limit, atol=limit)
        if one.numel() > 1000 and one.dtype != torch.float32:
            error, ideal = rounding_error(one, exact)
            assert error <= 1.02 * ideal, "the result was rounded more than once"


def _run(x: Tensor, y: Tensor, gate: Tensor | None, **norm: Any) -> None:
    got = ops.gate_residual_norm_modulate(x, y, gate, **norm)
    _check(got, reference(x, y, gate, got[0], **norm))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("rows", ["none", "batch", "token"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_values(memory_bound_by: str, dtype: torch.dtype, rows: str, kind: Any) -> None:
    for b, s, d in SHAPES:
        torch.manual_seed(d)
        x, y = (torch.randn(2, b, s, d) * 2 + 1).to(dtype)
        size = {"none": None, "batch": (b, d), "token": (b, s, d)}[rows]
        gate, scale, shift = torch.randn(3, *size) if size else (None, None, None)
        _run(x, y, gate, scale=scale, shift=shift, eps=1e-5, kind=kind)
        weight, bias = torch.randn(d).to(dtype), torch.randn(d)
        _run(x, y, gate, scale=scale, weight=weight, bias=bias, kind=kind)
        _run(x, y, None, weight=weight, kind=kind)
    assert ops.counts() == {("gate_residual_norm_modulate", memory_bound_by): 3 * len(SHAPES)}


def test_it_equals_the_two_ops(memory_bound_by: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 40, 96).bfloat16()
    gate, scale, shift = torch.randn(3, 3, 96)
    got = ops.gate_residual_norm_modulate(x, y, gate, scale, shift)
    residual = ops.gate_residual(x, y, gate)
    with ops.using(norm_modulate=memory_bound_by):
        assert torch.equal(got[0], residual)
        assert torch.equal(got[1], ops.norm_modulate(residual, scale, shift))


def test_in_place_and_strided(memory_bound_by: str) -> None:
    torch.manual_seed(0)
    fused = torch.randn(2, 11, 96)
    x, y = fused.chunk(2, dim=-1)
    gate, scale, shift = torch.randn(2, 6, 48).unbind(1)[:3]
    want = ops.gate_residual_norm_modulate(x, y, gate, scale, shift)
    kept = y.clone()
    got = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, out=x)
    assert got[0] is x and torch.equal(x, want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(y, kept), "y was not written to"
    into_y = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, out=y)
    assert into_y[0] is y
    _run(torch.randn(2, 48, 11).transpose(1, 2), kept, gate)
    _run(torch.randn(5, 48), torch.randn(5, 48), torch.randn(48), scale=torch.randn(5, 48))
    deep = torch.randn(2, 3, 4, 5)
    _run(deep, deep, None, weight=torch.randn(5))


def test_large_results_and_empty_ones(memory_bound_by: str) -> None:
    x = torch.randn(2, 2050, 2112, dtype=torch.bfloat16)
    gate, scale = torch.randn(2, 2, 2112)
    _run(x, x, gate, scale=scale)
    for shape in ((2, 0, 64), (0, 5, 64)):
        empty = torch.empty(shape)
        for result in ops.gate_residual_norm_modulate(empty, empty, None):
            assert result.shape == empty.shape


def test_threads_do_not_change_a_bit(memory_bound_by: str) -> None:
    x, y = torch.randn(2, 3, 700, 160).bfloat16()
    gate, scale = torch.randn(2, 3, 160)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.gate_residual_norm_modulate(x, y, gate, scale))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_shapes_are_errors(memory_bound_by: str) -> None:
    x = torch.randn(2, 3, 8)
    for size in ((2, 7), (3, 8), (2, 2, 8)):
        for name in ("gate", "scale", "shift"):
            with pytest.raises((AssertionError, ValueError), match=rf"{name}|modulation"):
                ops.gate_residual_norm_modulate(x, x, **{name: torch.randn(size)})  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="differ"):
        ops.gate_residual_norm_modulate(x, x[:1])
    with pytest.raises(AssertionError, match="must be like the input"):
        ops.gate_residual_norm_modulate(x, x, out=x[:1])
