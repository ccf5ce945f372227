"""Every implementation of quant_fp8_rowwise that runs here, code by code."""

from __future__ import annotations

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.ops.quant import SMALLEST_SCALE
from tests.refs.quant import quant_fp8_rowwise as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(memory_bound_by: str, dtype: torch.dtype) -> None:
    for shape in ((1,), (1, 1), (5, 33), (3, 7, 128), (2, 3, 2, 65)):
        torch.manual_seed(shape[-1])
        x = (torch.randn(shape) * torch.rand(*shape[:-1], 1) * 10).to(dtype)
        got, scale = ops.quant_fp8_rowwise(x)
        assert got.dtype == torch.float8_e4m3fn and got.shape == x.shape
        assert scale.dtype == torch.float32 and scale.shape == x.shape[:-1]
        torch.testing.assert_close(scale, x.float().abs().amax(-1) / 448, rtol=2e-7, atol=0)
        want = reference(x, scale)
        # x times the rounded inverse of the scale may be on the other side of a tie.
        differs = got.double() != want
        assert differs.double().mean() < 0.01
        torch.testing.assert_close(got.double(), want, rtol=2.0**-3, atol=2.0**-9)


def test_every_halfway_point_goes_to_the_even_code(memory_bound_by: str) -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    row = torch.cat((codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])))
    row = torch.cat((row, -row))
    got, scale = ops.quant_fp8_rowwise(row)  # the largest is 448: a scale of 1
    assert scale == 1
    assert torch.equal(got.double(), reference(row, scale))


def test_all_implementations_agree(memory_bound_by: str) -> None:
    x = torch.randn(64, 300).bfloat16()
    got, scale = ops.quant_fp8_rowwise(x)
    with ops.using(quant_fp8_rowwise="torch"):
        want, want_scale = ops.quant_fp8_rowwise(x)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scale, want_scale)


def test_rows_of_zeros_tiny_numbers_and_nan(memory_bound_by: str) -> None:
    x = torch.randn(4, 40)
    x[0] = 0
    x[1] = 1e-44
    x[2, 3] = float("nan")
    got, scale = ops.quant_fp8_rowwise(x)
    assert not got[0].float().any() and not got[1].float().any()
    assert scale[:2].tolist() == [SMALLEST_SCALE] * 2
    assert got[2].float().isnan().all() and scale[2].isnan()
    assert got[3].float().isfinite().all() and got[3].float().abs().max() == 448


def test_strided_and_empty_inputs(memory_bound_by: str) -> None:
    x = torch.randn(2, 5, 96)[..., 48:]
    for view in (x, x.transpose(1, 2)):
        for got, want in zip(
            ops.quant_fp8_rowwise(view), ops.quant_fp8_rowwise(view.contiguous()), strict=True
        ):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    got, scale = ops.quant_fp8_rowwise(torch.empty(0, 8))
    assert got.shape == (0, 8) and scale.shape == (0,)
    with pytest.raises(AssertionError, match="no rows"):
        ops.quant_fp8_rowwise(torch.empty(3, 0))
