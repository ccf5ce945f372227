"""Where results go: into a tensor the caller hands over (perhaps an input), or into a new one.

On a CPU a large new tensor is fresh pages, and their faults can cost more than the op.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_out(x: Tensor, out: Tensor | None) -> None:
    assert out is None or (out.shape == x.shape and out.dtype == x.dtype), (
        f"out {tuple(out.shape)} {out.dtype} must be like the input {tuple(x.shape)} {x.dtype}"
    )


def room(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`out`, or a new contiguous tensor like x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out


def into(out: Tensor | None, result: Tensor) -> Tensor:
    """For a truth: the result, moved into `out` if there is one."""
    return result if out is None else out.copy_(result)


def has_rows(*tensors: Tensor | None) -> bool:
    """Whether all that are there are rows of dense elements, as the native kernels take them."""
    return all(
        x is None
        or (x.ndim > 0 and (x.shape[-1] <= 1 or x.stride(-1) == 1))
        and (x.ndim <= 3 or x.is_contiguous())
        for x in tensors
    )
