"""Products with weights of one byte, beside what their rounded numbers give in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion.ops.quant import quant_fp8_rowwise
from sgl_diffusion.ops.quantised_linear import linear_fp8, linear_int8, quant_int8_rowwise

SHAPES = [((3, 5, 48), 32), ((1, 64), 16), ((2, 1, 1040), 80), ((7, 16), 4096)]
WAYS = {"int8": (quant_int8_rowwise, linear_int8), "fp8": (quant_fp8_rowwise, linear_fp8)}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_the_product_of_the_rounded_numbers(
    way: str, dtype: torch.dtype, shape: tuple[int, ...], out: int
) -> None:
    quantise, linear = WAYS[way]
    x, weight = drawn(*shape, dtype=dtype), drawn(out, shape[-1])
    bias = drawn(out, dtype=dtype)
    (rows, row_scale), (values, scale) = quantise(x), quantise(weight)
    assert values.dtype.itemsize == 1 and scale.shape == (out,)
    want = rows.double() @ values.double().t() * row_scale.double()[..., None] * scale.double()
    want += bias.double()
    got = linear(x, values, scale, bias)
    assert got.dtype == dtype and got.shape == want.shape
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert float((got.double() - want).abs().max()) <= 2 * rounding * float(want.abs().max())
    # And near what was meant: a byte holds some two digits.
    meant = x.double() @ weight.double().t() + bias.double()
    lost = float((got.double() - meant).norm() / meant.norm())
    assert lost < (0.02 if way == "int8" else 0.06)


@pytest.mark.parametrize("way", WAYS)
def test_rows_do_not_depend_on_their_company(way: str) -> None:
    quantise, linear = WAYS[way]
    values, scale = quantise(drawn(32, 64))
    x = drawn(9, 64)
    alone = torch.cat([linear(row[None], values, scale) for row in x])
    assert torch.allclose(linear(x, values, scale), alone, rtol=1e-6, atol=1e-6)


def test_int8_keeps_what_it_can_hold() -> None:
    x = torch.tensor([[127.0, -127.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [5e-5, -1e-4, 0.0, 2e-5]])
    values, scale = quant_int8_rowwise(x)
    assert values[0].tolist() == [127, -127, 1, 0] and float(scale[0]) == 1.0
    assert values[1].tolist() == [0, 0, 0, 0] and bool(torch.isfinite(1 / scale).all())
    assert values[2].tolist() == [64, -127, 0, 25]
