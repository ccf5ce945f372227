"""Linear layers with weights of one byte: y = x Wᵀ + b, with a scale for each row of W and of x.

Rows of x are quantised when they come (dynamic, per token). The product is exact in int8, whose
sums are integers; in fp8 it is that of the rounded numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sgl_diffusion.ops.quant import quant_fp8_rowwise

MULTIPLE = 16  # of both sizes of a weight: what the kernels of GPUs take
_LARGEST = 127.0
_SMALLEST_SCALE = 2.0**-100
_CUDA_ROWS = 17  # the least that its int8 product takes
_BLOCK_BYTES = 8 << 20  # of an fp8 weight that are there in 16 bits at a time


def quant_int8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 [..., D] and fp32 scales [...]: the largest of a row becomes 127."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / _LARGEST).clamp_min(_SMALLEST_SCALE)
    return (wide / scale.unsqueeze(-1)).round_().to(torch.int8), scale


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight int8 [out, in], scale fp32 [out]."""
    rows, row_scale = quant_int8_rowwise(x.flatten(0, -2))
    count = len(rows)
    if x.device.type == "cuda" and count < _CUDA_ROWS:  # not yet run on a GPU
        rows = functional.pad(rows, (0, 0, 0, _CUDA_ROWS - count))
    sums = torch._int_mm(rows, weight.t())[:count]
    y = sums.float().mul_(row_scale.unsqueeze(-1)).mul_(scale)
    return _finished(y, x, bias)


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight float8_e4m3fn [out, in], scale fp32 [out].

    A CPU has no product of fp8: there the weight is widened block by block, without rounding.
    """
    rows, row_scale = quant_fp8_rowwise(x.flatten(0, -2))
    if x.device.type == "cuda":  # not yet run on a GPU
        product = torch._scaled_mm(
            rows,
            weight.t(),
            scale_a=row_scale.unsqueeze(-1),
            scale_b=scale.unsqueeze(0),
            out_dtype=torch.bfloat16,
        )
        return _finished(product, x, bias)
    wide = rows.float()
    height = max(_BLOCK_BYTES // (weight.shape[1] * 4), 1)
    y = torch.cat([wide @ part.float().t() for part in weight.split(height)], dim=-1)
    return _finished(y.mul_(row_scale.unsqueeze(-1)).mul_(scale), x, bias)


def _finished(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype).unflatten(0, x.shape[:-1])
