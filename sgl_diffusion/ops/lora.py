"""LoRA: merge adapters into weights, take them out again bit for bit, or apply them per row.

A merge is undone with its record, not by subtracting: rounding would leave other weights. Weights
that are merged must be unmerged before other adapters are merged into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.base.errors import EngineError
from sgl_diffusion.ops import cuda_lora, library, lora_truth, triton_lora
from sgl_diffusion.ops.dispatch import FLOATS, Implementation, Op
from sgl_diffusion.ops.lora_types import ALGORITHM, LoraDelta, LoraRecord
from sgl_diffusion.ops.triton_register import implementation

_Merged = list[lora_truth.Merged]
_Deltas = Sequence[Sequence[LoraDelta]]
_Records = Sequence[LoraRecord]

# A record above this share of its weights becomes a copy of them.
_MOST = 0.75


def _flat(deltas: _Deltas) -> tuple[Any, ...]:
    """The adapters as the native ops take them: one list, and how many each weight has."""
    every = [delta for some in deltas for delta in some]
    return (
        [delta.down.detach() for delta in every],
        [delta.up.detach() for delta in every],
        [float(delta.scale) for delta in every],
        [delta.start for delta in every],
        [len(some) for some in deltas],
    )


def _refuses(first: Tensor, weights: Sequence[Tensor], deltas: _Deltas, *_: Any) -> str:
    for weight in weights:
        if weight.device != first.device or weight.dtype not in FLOATS:
            return f"a weight of {weight.dtype} on {weight.device}"
        if weight.shape[1] > 1 and weight.stride(1) != 1:
            return "a weight that is not dense in its last dimension"
    for delta in (delta for some in deltas for delta in some):
        for factor in (delta.down, delta.up):
            if factor.device != first.device or factor.dtype not in FLOATS:
                return f"an adapter of {factor.dtype} on {factor.device}"
    return ""


def _merge_native(first: Tensor, weights: Sequence[Tensor], deltas: _Deltas) -> _Merged:
    parts = torch.ops.sgld.lora_merge_.default(list(weights), *_flat(deltas))
    return list(zip(*parts, strict=True))


def _merge_truth(first: Tensor, weights: Sequence[Tensor], deltas: _Deltas) -> _Merged:
    for index, some in enumerate(deltas):
        lora_truth.check_finite(some, index)
    return [lora_truth.merge(*pair) for pair in zip(weights, deltas, strict=True)]


def _unmerge_native(
    first: Tensor, weights: Sequence[Tensor], deltas: _Deltas, records: _Records
) -> list[int]:
    return torch.ops.sgld.lora_unmerge_.default(
        list(weights),
        *_flat(deltas),
        [record.codes for record in records],
        [record.escapes for record in records],
        [record.ends for record in records],
    )


def _unmerge_truth(
    first: Tensor, weights: Sequence[Tensor], deltas: _Deltas, records: _Records
) -> list[int]:
    return [
        lora_truth.unmerge(weight, some, record.codes, record.escapes)
        for weight, some, record in zip(weights, deltas, records, strict=True)
    ]


def _apply_native(x: Tensor, y: Tensor, adapters: _Deltas, index: Tensor | None) -> Tensor:
    downs, ups, *rest = _flat(adapters)
    dense = y.contiguous()
    torch.ops.sgld.lora_apply_.default(
        x.flatten(0, -2).contiguous(),
        dense.flatten(0, -2),
        None if index is None else index.flatten().long().contiguous(),
        [down.contiguous() for down in downs],
        [up.contiguous() for up in ups],
        *rest,
    )
    return y if dense is y else y.copy_(dense)


def _apply_refuses(x: Tensor, y: Tensor, adapters: _Deltas, index: Tensor | None) -> str:
    factors = [factor for some in adapters for delta in some for factor in (delta.down, delta.up)]
    for tensor in (y, *factors):
        if tensor.device != x.device or tensor.dtype not in FLOATS:
            return f"a tensor of {tensor.dtype} on {tensor.device}"
    return ""


@library.fake("lora_apply_")
def _fake(*_: Any) -> None:
    return None


def _on_gpu(run: Callable[..., Any]) -> Implementation:
    """The CUDA kernels; on the CPU, by name, their tiles one after another."""
    return Implementation(
        "cuda",
        run,
        ("cuda",),
        sm=range(80, 1000),
        named_devices=("cpu",),
        absent=library.without_cuda,
        refuses=_refuses,
    )


_merge = Op(
    "lora_merge_",
    _merge_truth,
    Implementation("cpu", _merge_native, ("cpu",), absent=library.absent, refuses=_refuses),
    _on_gpu(cuda_lora.merge),
)
_unmerge = Op(
    "lora_unmerge_",
    _unmerge_truth,
    Implementation("cpu", _unmerge_native, ("cpu",), absent=library.absent, refuses=_refuses),
    _on_gpu(cuda_lora.unmerge),
)
_apply = Op(
    "lora_apply",
    lora_truth.apply,
    Implementation("cpu", _apply_native, ("cpu",), absent=library.absent, refuses=_apply_refuses),
    implementation(triton_lora.apply, triton_lora.refuses_apply),
)


def _check(weight: Tensor, deltas: Sequence[LoraDelta]) -> None:
    assert weight.ndim == 2 and weight.dtype in FLOATS, f"a weight is {tuple(weight.shape)}"
    assert deltas, "a weight needs at least one adapter"
    out, width = weight.shape
    for delta in deltas:
        down, up = tuple(delta.down.shape), tuple(delta.up.shape)
        assert len(down) == 2 and down[1] == width, f"down {down} must be [rank, in], in is {width}"
        assert len(up) == 2 and up[1] == down[0], f"up {up} must be [rows, rank], rank is {down[0]}"
        fits = delta.start >= 0 and delta.end <= out
        assert fits, f"rows {delta.start} to {delta.end} of up are not within out, which is {out}"


def lora_merge_(weights: Sequence[Tensor], deltas: _Deltas) -> tuple[LoraRecord, ...]:
    """Add adapters to weights [out, in], in place, many matrices in one call.

    All adapters of a weight are summed in fp32 before the only rounding. The records restore the
    weights with `lora_unmerge_`; they hold on to the adapters, which must not change until then.
    An adapter that is not finite is an error before any weight has changed.
    """
    assert len(weights) == len(deltas), f"{len(weights)} weights, {len(deltas)} lists of adapters"
    for weight, some in zip(weights, deltas, strict=True):
        _check(weight, some)
    full = [weight.data_ptr() for weight in weights if weight.numel()]
    assert len(set(full)) == len(full), "a weight is listed twice; give it all adapters at once"
    if not weights:
        return ()
    starts = [min(delta.start for delta in some) for some in deltas]
    ends = [max(delta.end for delta in some) for some in deltas]
    views = [w.detach()[a:b] for w, a, b in zip(weights, starts, ends, strict=True)]
    moved = [
        tuple(replace(delta, start=delta.start - start) for delta in some)
        for some, start in zip(deltas, starts, strict=True)
    ]
    records = []
    merged = _merge(views[0], views, moved)
    for view, some, start, parts in zip(views, moved, starts, merged, strict=True):
        codes, escapes, ends, checksum = parts
        shape = (view.shape[0], view.shape[1])
        record = LoraRecord(codes, escapes, ends, checksum, start, shape, some)
        records.append(_fitting(view, record))
    return tuple(records)


def _fitting(merged: Tensor, record: LoraRecord) -> LoraRecord:
    """The record, or a copy of the weights where their sample had promised shorter codes."""
    if record.codes.shape[1] == 0 or record.nbytes <= _MOST * merged.nbytes + record.ends.nbytes:
        return record
    base = merged.clone()
    _restore([base], [record])
    rows, cols = record.shape
    step = lora_truth.ROWS * cols
    ends = (torch.arange(len(record.ends), device=base.device) * step).clamp(max=base.numel())
    codes = record.codes.new_empty(rows, 0)
    return replace(record, codes=codes, escapes=base.flatten(), ends=ends, checksum=0)


def lora_unmerge_(weights: Sequence[Tensor], records: _Records) -> None:
    """Restore weights to what they were before `lora_merge_` gave these records, bit for bit.

    Weights or adapters that have changed since are an error: the weights are lost then.
    """
    assert len(weights) == len(records), f"{len(weights)} weights, {len(records)} records"
    views = []
    for weight, record in zip(weights, records, strict=True):
        view = weight.detach()[record.start : record.start + record.shape[0]]
        assert view.shape == record.shape, f"a record of {record.shape} is not of {weight.shape}"
        assert view.dtype == record.escapes.dtype, f"a record of another dtype than {view.dtype}"
        assert record.algorithm == ALGORITHM, f"merged by {record.algorithm}, not {ALGORITHM}"
        views.append(view)
    if views:
        _restore(views, records)


def _restore(views: Sequence[Tensor], records: _Records) -> None:
    checksums = _unmerge(views[0], views, [record.deltas for record in records], records)
    for index, (found, record) in enumerate(zip(checksums, records, strict=True)):
        if found != record.checksum:
            raise EngineError(
                f"Weight {index} could not be restored: it or its adapters changed while merged.",
                hint="Load the weights again.",
            )


def lora_apply(x: Tensor, y: Tensor, adapters: _Deltas, index: Tensor | None = None) -> Tensor:
    """As `lora_apply_`, on a copy of y."""
    return lora_apply_(x, y.clone(memory_format=torch.contiguous_format), adapters, index)


def lora_apply_(x: Tensor, y: Tensor, adapters: _Deltas, index: Tensor | None = None) -> Tensor:
    """`y += scale * (x @ down.T) @ up.T` with the adapter of each row, without merging; gives y.

    x [..., in]; y [..., out]; an adapter is a list of deltas, several for the segments of a fused
    weight; a `LoraStack` has adapters in tensors that may be written to between calls. index
    int [...] says which adapter a row of x has (-1: none); with fewer dimensions than x's rows it
    is per batch row; None: all rows have every adapter given.
    """
    assert x.shape[:-1] == y.shape[:-1], f"x {tuple(x.shape)} and y {tuple(y.shape)} differ"
    if index is not None:
        rows = x.shape[:-1]
        assert index.shape == rows[: index.ndim], f"index {tuple(index.shape)} is not of {rows}"
        index = index.reshape(*index.shape, *[1] * (len(rows) - index.ndim)).expand(rows)
    for deltas in adapters:
        for delta in deltas:
            assert delta.down.shape[1] == x.shape[-1], "down must be [rank, in of x]"
            assert delta.up.shape[1] == delta.down.shape[0], "up must be [rows, rank of down]"
            assert 0 <= delta.start <= delta.end <= y.shape[-1], "up is not within out of y"
    return _apply(x, y, adapters, index)
