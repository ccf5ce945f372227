"""Every implementation of norm_modulate that runs here against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from tests.refs.norm_modulate import norm_modulate as reference
from tests.refs.norm_modulate import rounding_error

SHAPES = [(1, 1), (1, 7), (3, 1, 33), (5, 123, 40), (5, 123, 64), (2, 31, 128), (2, 9, 1536)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, modulation: str, affine: bool
) -> dict[str, Any]:
    torch.manual_seed(sum(shape))
    batch, tokens, width = shape if len(shape) == 3 else (1, *shape)
    rows = {
        "none": None,
        "batch": (batch, width),
        "batch_kept": (batch, 1, width),
        "token": (batch, tokens, width),
    }[modulation]
    if rows is not None and len(shape) == 2:
        rows = rows[-2:]

    def part(size: tuple[int, ...] | None, part_dtype: torch.dtype) -> Tensor | None:
        return None if size is None else torch.randn(size).to(part_dtype)

    return {
        "x": (torch.randn(shape) * 3 + 1).to(dtype),
        "scale": part(rows, torch.float32),
        "shift": part(rows, dtype),
        "weight": part((width,) if affine else None, dtype),
        "bias": part((width,) if affine else None, torch.float32),
    }


def _check(got: Tensor, want: Tensor) -> None:
    """Within rounding of the exact value: each element, and the RMS of all of them."""
    assert got.shape == want.shape
    limits = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
    limit = limits[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=limit)
    if got.numel() > 1000 and got.dtype != torch.float32:
        error, ideal = rounding_error(got, want)
        assert error <= 1.02 * ideal, "the result was rounded more than once"


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("modulation", ["none", "batch", "batch_kept", "token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(norm_modulate_by: str, dtype: torch.dtype, modulation: str, kind: Any) -> None:
    for shape in SHAPES:
        for affine in (False, True):
            given = _inputs(shape, dtype, modulation, affine)
            got = ops.norm_modulate(**given, eps=1e-5, kind=kind)
            assert got.dtype == dtype
            _check(got, reference(**given, eps=1e-5, kind=kind))
    assert ops.counts() == {("norm_modulate", norm_modulate_by): 2 * len(SHAPES)}


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_dtype(norm_modulate_by: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    given = _inputs((2, 31, 129), dtype, "batch", True)
    got = ops.norm_modulate(**given, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    _check(got, reference(**given))


def test_only_one_of_scale_and_shift(norm_modulate_by: str) -> None:
    given = _inputs((2, 31, 72), torch.float32, "token", False)
    for missing in ("scale", "shift"):
        one = given | {missing: None}
        _check(ops.norm_modulate(**one), reference(**one))
    mixed = given | {"scale": torch.randn(72), "shift": torch.randn(1, 31, 72)}
    _check(ops.norm_modulate(**mixed), reference(**mixed))


def test_strided_inputs(norm_modulate_by: str) -> None:
    """Views of fused outputs, as the models make them, and a last dimension that is not dense."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 3 * 48)[..., 48:96]
    per_batch = torch.randn(2, 6, 48).unbind(1)
    per_token = torch.randn(2, 11, 6, 48).unbind(2)
    sparse = torch.randn(2, 48, 11).transpose(1, 2)
    assert not x.is_contiguous() and not per_token[1].is_contiguous() and sparse.stride(-1) != 1
    for given in (
        {"x": x, "scale": per_batch[1], "shift": per_batch[0]},
        {"x": x, "scale": per_token[1], "shift": per_batch[3]},
        {"x": sparse, "scale": per_token[4], "shift": sparse, "weight": torch.randn(96)[::2]},
        {"x": x.expand(2, 11, 48)[:1].expand(4, 11, 48)},
        {"x": torch.randn(2, 5, 7, 96)[..., ::2], "weight": torch.randn(48)},
    ):
        _check(ops.norm_modulate(**given), reference(**given))


def test_empty_inputs(norm_modulate_by: str) -> None:
    for shape in ((2, 0, 64), (0, 5, 64), (0, 64)):
        x = torch.empty(shape, dtype=torch.bfloat16)
        scale = torch.empty(shape)
        got = ops.norm_modulate(x, scale, scale, out_dtype=torch.float32)
        assert got.shape == x.shape and got.dtype == torch.float32


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_larger_than_the_caches(norm_modulate_by: str, out_dtype: torch.dtype) -> None:
    """Large results are stored past the caches, if their rows are multiples of 64 bytes."""
    for width in (2112, 2100):
        x = torch.randn(2, 2050, width, dtype=torch.bfloat16)
        scale, shift = torch.randn(2, 2, width)
        got = ops.norm_modulate(x, scale, shift, out_dtype=out_dtype)
        _check(got, reference(x, scale, shift))


def test_large_mean_does_not_cancel(norm_modulate_by: str) -> None:
    x = torch.randn(3, 5, 640) + 1000.0
    got, want = ops.norm_modulate(x), reference(x)
    # 1000 in fp32 has a spacing of 6e-5: that much the mean itself may be off.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)


def test_infinity_and_nan_stay_in_their_row(norm_modulate_by: str) -> None:
    x = torch.randn(1, 4, 100)
    clean = ops.norm_modulate(x)
    x[0, 1, 7] = float("nan")
    x[0, 2, 99] = float("inf")
    got = ops.norm_modulate(x, out_dtype=torch.bfloat16)
    assert got[0, 1].isnan().all() and got[0, 2].isnan().all()
    assert torch.equal(got[0, (0, 3)], clean[0, (0, 3)].bfloat16())


def test_threads_do_not_change_a_bit(norm_modulate_by: str) -> None:
    given = _inputs((3, 700, 160), torch.bfloat16, "batch", True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.norm_modulate(**given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_wrong_shape_is_an_error(norm_modulate_by: str) -> None:
    x = torch.randn(2, 3, 8)
    for size in ((2, 7), (3, 8), (2, 2, 8), (2, 1), (1, 2, 3, 8)):
        with pytest.raises((AssertionError, ValueError), match=r"scale|modulation"):
            ops.norm_modulate(x, torch.randn(size))
    with pytest.raises(ValueError, match=r"weight \[7\] has size 7 in dimension 0 where D is 8"):
        torch.ops.sgld.norm_modulate(
            x, None, None, torch.randn(7), None, 1e-6, False, torch.float32
        )
