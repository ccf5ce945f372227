"""quant_fp8_rowwise: a tensor as float8_e4m3fn with one scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion.ops import library, triton_elementwise
from sgl_diffusion.ops.dispatch import Implementation, Op
from sgl_diffusion.ops.triton_register import implementation

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_SCALE = 2.0**-100  # so that its inverse is finite


def _truth(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = (wide.abs().amax(-1) / LARGEST).clamp_min(SMALLEST_SCALE)
    scaled = wide * (1.0 / scale).unsqueeze(-1)
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _native(x: Tensor) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    torch.ops.sgld.quant_fp8_rowwise.default(x, out, scale)
    return out, scale


library.fake("quant_fp8_rowwise")(lambda *args: None)

_quant_fp8_rowwise = Op(
    "quant_fp8_rowwise",
    _truth,
    Implementation("cpu", _native, ("cpu",), absent=library.absent),
    implementation(triton_elementwise.quant_fp8_rowwise, triton_elementwise.refuses),
)


def quant_fp8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as float8_e4m3fn [..., D] and fp32 scales [...]: x is about their product.

    The largest magnitude of a row becomes 448, the largest number of the format; the rest is
    rounded to nearest even.
    """
    assert x.ndim > 0 and x.shape[-1] > 0, f"x {tuple(x.shape)} has no rows of numbers"
    return _quant_fp8_rowwise(x)
