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
from sgl_diffusion.ops.lora_types import LoraDelta
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


def apply(
    x: Tensor, y: Tensor, adapters: Sequence[Sequence[LoraDelta]], index: Tensor | None
) -> Tensor:
    """Each row's adapter added to y: a launch for every segment of rows that adapters reach."""
    rows = x.flatten(0, -2)
    tokens = rows.shape[0]
    if index is None:  # all rows have all of them: each is a launch of its own
        chosen = [[(0, delta)] for some in adapters for delta in some]
        where = torch.zeros(tokens, dtype=torch.int32, device=x.device)
    else:
        chosen = _segments(adapters)
        where = index.flatten().int()
    spans = sorted((part[0][1].start, part[0][1].end) for part in chosen)
    overlap = any(end > start for (_, end), (start, _) in itertools.pairwise(spans))
    # Where several are added to the same numbers only the sum is rounded.
    dense = (y.float() if overlap else y).contiguous()
    out = dense.flatten(0, -2)
    for part in chosen:
        first, rank = part[0][1], max(delta.down.shape[0] for _, delta in part)
        if rank == 0 or first.up.shape[0] == 0:
            continue
        count = 1 if index is None else len(adapters)
        a = x.new_zeros(count, rank, x.shape[-1])
        b = x.new_zeros(count, first.up.shape[0], rank)
        scales = torch.zeros(count)
        for number, delta in part:
            a[number, : delta.down.shape[0]] = delta.down
            b[number, :, : delta.down.shape[0]] = delta.up
            scales[number] = delta.scale
        lora_apply_(out[:, first.start : first.end], rows, a, b, scales.to(x.device), where)
    return y if dense is y else y.copy_(dense)


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
    for delta in (delta for some in adapters for delta in some):
        for factor in (delta.down, delta.up):
            if factor.dtype != x.dtype or factor.device != x.device:
                return f"an adapter of {factor.dtype} on {factor.device} for {x.dtype}"
    return triton_impl.refuses(x)
