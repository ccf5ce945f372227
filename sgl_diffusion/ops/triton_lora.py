"""LoRA merge, exact unmerge and the unmerged branch, by Triton.

Merge and unmerge are no torch ops: they change weights between steps, outside of any graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ops.triton_register import register


@functools.cache
def _library() -> torch.library.Library:
    from sgl_diffusion.kernels.lora_apply import lora_apply_launch

    def apply(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, index: Tensor) -> None:
        lora_apply_launch(y, x, a, b, scales, index)

    schema = "lora_apply_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scales, Tensor index)"
    return register((f"{schema} -> ()", apply, lambda *_: None))


def lora_merge_(
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    owners: list[int] | None = None,
    starts: list[int] | None = None,
) -> Any:
    """weights[owners[i]] += scales[i] * b[i] @ a[i] in one launch; returns what unmerge needs.

    b[i] reaches the rows from starts[i].
    `.failed()` of the result names the matrices whose difference did not fit: unmerge the group,
    keep a copy of those, and merge again.
    """
    from sgl_diffusion.kernels.lora import lora_merge_launch

    return lora_merge_launch(weights, a, b, scales, owners, starts)


def lora_unmerge_(
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    codes: Any,
    owners: list[int] | None = None,
    starts: list[int] | None = None,
) -> None:
    """Every weight gets the bits back that it had before the merge that returned `codes`."""
    from sgl_diffusion.kernels.lora import lora_unmerge_launch

    lora_unmerge_launch(weights, a, b, scales, codes, owners, starts)


def lora_apply_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, index: Tensor
) -> Tensor:
    """y [T, out] += scales[n] * (x aᵀ) bᵀ with n = index[token]; -1 leaves a token as it is."""
    _library()
    torch.ops.sgld_triton.lora_apply_.default(y, x, a, b, scales, index)
    return y
