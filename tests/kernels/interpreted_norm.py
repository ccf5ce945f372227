"""Values of the Triton norm_modulate; `test_norm.py` runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton import knobs

from sgl_diffusion.kernels.norm import norm_modulate_launch
from tests.refs.norm_modulate import norm_modulate as reference

assert knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"


def _inputs(shape: tuple[int, ...], rows: tuple[int, ...] | None, affine: bool) -> dict[str, Any]:
    torch.manual_seed(3)
    width = shape[-1]
    return {
        "scale": None if rows is None else torch.randn(rows),
        "shift": None if rows is None else torch.randn(rows).half(),
        "weight": torch.randn(width) if affine else None,
        "bias": torch.randn(width).half() if affine else None,
    }


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 1), None),
        ((5, 7), (5, 7)),
        ((2, 3, 40), (2, 40)),
        ((2, 3, 128), (2, 1, 128)),
        ((2, 3, 1536), (2, 3, 1536)),
        ((1, 2, 5120), (5120,)),
        ((2, 2, 3, 24), None),
    ],
)
def test_values(
    shape: tuple[int, ...],
    rows: tuple[int, ...] | None,
    dtype: torch.dtype,
    rms: bool,
) -> None:
    x = (torch.randn(shape) * 2 + 1).to(dtype)
    given = _inputs(shape, rows, affine=len(shape) != 2)
    got = norm_modulate_launch(x, **given, eps=1e-5, rms=rms, out_dtype=dtype)
    want = reference(x, **given, eps=1e-5, kind="rms" if rms else "layer")
    assert got.dtype == dtype and got.shape == x.shape
    limit = {torch.float32: 1e-5, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=limit)


def test_strided_and_empty_inputs() -> None:
    x = torch.randn(2, 5, 3 * 40)[..., 40:80]
    scale, shift = torch.randn(2, 5, 6, 40).unbind(2)[1:3]
    given = {"scale": scale, "shift": shift, "weight": torch.randn(80)[::2], "bias": None}
    got = norm_modulate_launch(x, **given, eps=1e-6, rms=False, out_dtype=x.dtype)
    torch.testing.assert_close(got.double(), reference(x, **given), rtol=1e-5, atol=1e-5)
    empty = norm_modulate_launch(x[:, :0], None, None, None, None, 1e-6, False, torch.float16)
    assert empty.shape == (2, 0, 40) and empty.dtype == torch.float16
