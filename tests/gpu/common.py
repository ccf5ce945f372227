"""What the GPU tests share: fresh inputs on the device and the comparison with float64."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
STEP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def fresh(*shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 1.0) -> Tensor:
    """Random values, other ones in every run."""
    return (torch.randn(shape, device="cuda") * size).to(dtype)


def close(got: Tensor, want: Tensor, steps: float = 1.0) -> None:
    """Within `steps` roundings of the result's dtype, everywhere; NaN never passes."""
    assert got.shape == want.shape
    limit = steps * STEP[got.dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=limit, atol=limit)


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the error over the norm of the exact result."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bytes: NaN equals itself, and zero is not negative zero."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
