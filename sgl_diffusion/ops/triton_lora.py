"""LoRA merge, exact unmerge and the unmerged branch, by Triton.

Merge and unmerge are no torch ops: they change weights between steps, outside of any graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ops import triton_impl
from sgl_diffusion.ops.lora_types import LoraDelta, LoraStack
from sgl_diffusion.ops.triton_register import register


@functools.cache
def _library() -> torch.library.Library:
    from sgl_diffusion.kernels.lora_apply import lora_apply_launch

    def apply(
        y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor | None, index: Tensor
    ) -> None:
        lora_apply_launch(y, x, a, b, scales, index)

    schema = "lora_apply_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor? scales, Tensor index)"
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
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor | None, index: Tensor
) -> Tensor:
    """y [T, out] += scales[n] * (x aᵀ) bᵀ with n = index[token]; -1 leaves a token as it is.

    Without scales they are 1; then b may be fp32 beside narrower x and a.
    """
    _library()
    torch.ops.sgld_triton.lora_apply_.default(y, x, a, b, scales, index)
    return y


_Part = tuple[Tensor, Tensor, Tensor | None, int]  # a, b and scales of a launch, and its first row


def apply(
    x: Tensor, y: Tensor, adapters: Sequence[Sequence[LoraDelta]], index: Tensor | None
) -> Tensor:
    """Each row's adapter added to y: a launch for every segment of rows that adapters reach."""
    from sgl_diffusion.kernels.settings import LORA_APPLY

    rows = x.flatten(0, -2)
    if index is None:  # all rows have all of them: each is a launch of its own
        where = torch.zeros(rows.shape[0], dtype=torch.int32, device=x.device)
        parts = [_part(x, [(0, delta)], 1) for some in adapters for delta in some]
    else:
        where = index.flatten().int().contiguous()  # of one row: its number, at one place
        if isinstance(adapters, LoraStack):
            parts = [(part.down, part.up, None, part.start) for part in adapters.parts]
        else:
            parts = [_part(x, group, len(adapters)) for group in _segments(adapters)]
    parts = [part for part in parts if part[0].shape[1] and part[1].shape[1]]
    most = LORA_APPLY.most_rank
    spans = sorted((start, start + b.shape[1]) for _, b, _, start in parts)
    overlap = any(end > start for (_, end), (start, _) in itertools.pairwise(spans))
    # Where several are added to the same numbers only the sum is rounded.
    several = overlap or any(a.shape[1] > most for a, *_ in parts)
    dense = (y.float() if several else y).contiguous()
    out = dense.flatten(0, -2)
    for a, b, scales, start in parts:
        for rank in range(0, a.shape[1], most):
            ranks = slice(rank, rank + most)
            to = out[:, start : start + b.shape[1]]
            lora_apply_(to, rows, a[:, ranks], b[:, :, ranks], scales, where)
    return y if dense is y else y.copy_(dense)


def _part(x: Tensor, group: Sequence[tuple[int, LoraDelta]], count: int) -> _Part:
    """Some of `count` adapters on the same rows, by their numbers, side by side."""
    first, rank = group[0][1], max(delta.down.shape[0] for _, delta in group)
    a = x.new_zeros(count, rank, x.shape[-1])
    b = x.new_zeros(count, first.up.shape[0], rank)
    scales = torch.zeros(count)
    for number, delta in group:
        a[number, : delta.down.shape[0]] = delta.down
        b[number, :, : delta.down.shape[0]] = delta.up
        scales[number] = delta.scale
    return a, b, scales.to(x.device), first.start


def _segments(adapters: Sequence[Sequence[LoraDelta]]) -> list[list[tuple[int, LoraDelta]]]:
    """The adapters' parts, those on the same rows together, with one of each adapter at most."""
    found: dict[tuple[int, int, int], list[tuple[int, LoraDelta]]] = {}
    for number, some in enumerate(adapters):
        seen: dict[tuple[int, int], int] = {}
        for delta in some:
            span = (delta.start, delta.end)
            seen[span] = seen.get(span, 0) + 1
            found.setdefault((*span, seen[span]), []).append((number, delta))
    return list(found.values())


def refuses_apply(
    x: Tensor, y: Tensor, adapters: Sequence[Sequence[LoraDelta]], index: Tensor | None
) -> str:
    stacked = isinstance(adapters, LoraStack) and index is not None
    wide = (x.dtype, torch.float32) if stacked else (x.dtype,)
    for delta in (delta for some in adapters for delta in some):
        for factor, dtypes in ((delta.down, (x.dtype,)), (delta.up, wide)):
            if factor.dtype not in dtypes or factor.device != x.device:
                return f"an adapter of {factor.dtype} on {factor.device} for {x.dtype}"
    return triton_impl.refuses(x)
