"""LoRA merge into weights and exact unmerge: one grouped, persistent launch over many matrices.

merge: W' = round(W + delta), delta = sum of scale * (B A) over the adapters of a matrix, in fp32.
Rounding loses what unmerge needs, so merge also keeps, for every weight, by how many representable
numbers round(W' - delta) misses W: 4 bits, or an escape with the weight itself. Unmerge computes
the same delta with the same instructions (no fused multiply-add, so the compiler has no freedom)
and puts the miss back: every bit of W returns.

A tile whose escapes find no more room is left unmerged and marked so: the caller sees the count,
takes the tiles back that were merged, and keeps a copy of that matrix instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl

from .settings import LORA, LORA_PROGRAMS_PER_SM, escape_room

_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of the table of matrices and of the table of parts (the adapters of the matrices).
# matrix: weight, rows, columns, row stride, first tile, parts from, parts to, codes from, escapes
# from, room for escapes; part: a, b, rank, row stride of a, row stride of b, first row, rows.
_MATRIX, _PART = tl.constexpr(10), tl.constexpr(7)


@triton.jit
def _delta(
    parts_ptr,
    scales_ptr,
    part,
    last_part,
    at_m,
    at_n,
    columns,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    IEEE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
):
    """The fp32 sum of scale * (B A) of a tile; merge and unmerge share every instruction of it."""
    delta = tl.zeros([M, N], dtype=tl.float32)
    lane = tl.arange(0, RANK)
    for i in range(part, last_part):
        record = parts_ptr + i * _PART
        a_ptr = tl.load(record).to(tl.pointer_type(KIND))
        b_ptr = tl.load(record + 1).to(tl.pointer_type(KIND))
        rank = tl.load(record + 2).to(tl.int32)
        a_row = tl.load(record + 3)
        b_row = tl.load(record + 4)
        row = at_m - tl.load(record + 5)
        inside = (row >= 0) & (row < tl.load(record + 6))
        if ALIGNED:
            a_ptr = tl.multiple_of(a_ptr, 16)
            b_ptr = tl.multiple_of(b_ptr, 16)
            a_row = tl.multiple_of(a_row, 8)
            b_row = tl.multiple_of(b_row, 8)
            rank = tl.multiple_of(rank, 8)
        product = tl.zeros([M, N], dtype=tl.float32)
        for first in range(0, rank, RANK):
            r = first + lane
            b = tl.load(
                b_ptr + row[:, None] * b_row + r[None, :],
                mask=inside[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            a = tl.load(
                a_ptr + r[:, None] * a_row + at_n[None, :],
                mask=(r < rank)[:, None] & (at_n < columns)[None, :],
                other=0.0,
            )
            product = tl.dot(b, a, product, input_precision="ieee" if IEEE else "tf32")
        delta += product * tl.load(scales_ptr + i)
    return delta


@triton.jit
def _ordered(bits, WIDE: tl.constexpr):
    """Bits of a float as an integer that counts representable numbers; -0 and +0 are neighbours."""
    if WIDE:
        bits = bits.to(tl.int64)
        return tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)
    bits = bits.to(tl.int32)
    return tl.where(bits < 0, -1 - (bits & 0x7FFF), bits)


@triton.jit
def _bits(ordered, WIDE: tl.constexpr):
    if WIDE:
        return tl.where(ordered < 0, -2147483648 | (-1 - ordered), ordered).to(tl.int32)
    return tl.where(ordered < 0, -32768 | (-1 - ordered), ordered).to(tl.int16)


@triton.jit
def _lora_kernel(
    matrices_ptr,
    parts_ptr,
    scales_ptr,
    owner_ptr,
    codes_ptr,
    merged_ptr,
    escape_ptr,
    escapes_ptr,
    tiles,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    MERGE: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    IEEE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    RANK: tl.constexpr,
):
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        matrix = tl.load(owner_ptr + tile)
        record = matrices_ptr + matrix * _MATRIX
        weight_ptr = tl.load(record).to(tl.pointer_type(WEIGHT))
        rows = tl.load(record + 1).to(tl.int32)
        columns = tl.load(record + 2).to(tl.int32)
        row_stride = tl.load(record + 3)
        if ALIGNED:
            weight_ptr = tl.multiple_of(weight_ptr, 16)
            row_stride = tl.multiple_of(row_stride, 8)
            columns = tl.multiple_of(columns, 16)
        local = tile - tl.load(record + 4).to(tl.int32)
        across = tl.cdiv(columns, N)
        at_m = (local // across) * M + tl.arange(0, M)
        at_n = (local % across) * N + tl.arange(0, N)
        delta = _delta(
            parts_ptr,
            scales_ptr,
            tl.load(record + 5).to(tl.int32),
            tl.load(record + 6).to(tl.int32),
            at_m.to(tl.int64),
            at_n,
            columns,
            KIND,
            ALIGNED,
            IEEE,
            M,
            N,
            RANK,
        )
        inside = (at_m < rows)[:, None] & (at_n < columns)[None, :]
        where = weight_ptr + at_m.to(tl.int64)[:, None] * row_stride + at_n[None, :]
        w = tl.load(where, mask=inside, other=0.0)
        WORD: tl.constexpr = tl.int32 if WIDE else tl.int16
        if KEEP:
            pairs = (columns + 1) // 2
            at_pair = (local % across) * (N // 2) + tl.arange(0, N // 2)
            code_where = (
                codes_ptr
                + tl.load(record + 7)
                + at_m.to(tl.int64)[:, None] * pairs
                + at_pair[None, :]
            )
            pair_inside = (at_m < rows)[:, None] & (at_pair < pairs)[None, :]
        if MERGE:
            merged = (w.to(tl.float32) + delta).to(WEIGHT)
            if KEEP:
                back = (merged.to(tl.float32) - delta).to(WEIGHT)
                bits = w.to(WORD, bitcast=True)
                miss = _ordered(bits, WIDE) - _ordered(back.to(WORD, bitcast=True), WIDE)
                escaped = inside & ((miss > 7) | (miss < -7))
                code = tl.where(escaped, 0, miss + 8).to(tl.int32)
                low, high = tl.split(tl.reshape(code, [M, N // 2, 2]))
                tl.store(code_where, (low | (high << 4)).to(tl.uint8), mask=pair_inside)
                one = escaped.to(tl.int32)
                in_row = tl.cumsum(one, axis=1)
                by_row = tl.sum(one, axis=1)
                count = tl.sum(by_row)
                fits = True
                if count > 0:
                    first = tl.atomic_add(escapes_ptr + matrix, count)
                    fits = first + count <= tl.load(record + 9)
                    slot = first + (tl.cumsum(by_row, axis=0) - by_row)[:, None] + in_row - one
                    at = at_m[:, None] * columns + at_n[None, :]
                    entry = (at.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
                    start = escape_ptr + tl.load(record + 8)
                    tl.store(start + slot, entry, mask=escaped & fits)
                tl.store(merged_ptr + tile, fits.to(tl.uint8))
                tl.store(where, merged, mask=inside & fits)
            else:
                tl.store(where, merged, mask=inside)
        else:
            back = (w.to(tl.float32) - delta).to(WEIGHT)
            code = tl.load(code_where, mask=pair_inside, other=0).to(tl.int32)
            miss = tl.reshape(tl.join(code & 15, code >> 4), [M, N]) - 8
            ordered = _ordered(back.to(WORD, bitcast=True), WIDE) + miss
            fits = tl.load(merged_ptr + tile) != 0
            # An escaped weight becomes anything here; the next kernel writes it.
            tl.store(where, _bits(ordered, WIDE).to(WEIGHT, bitcast=True), mask=inside & fits)


@triton.jit
def _restore_kernel(
    matrices_ptr,
    escape_ptr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the escaped weights back."""
    record = matrices_ptr + tl.program_id(0) * _MATRIX
    weight_ptr = tl.load(record).to(tl.pointer_type(WEIGHT))
    columns = tl.load(record + 2).to(tl.int32)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = slot < tl.load(record + 9)
    start = tl.load(record + 8)
    entry = tl.load(escape_ptr + start + slot, mask=used, other=-1)
    at = (entry >> 32).to(tl.int32)
    WORD: tl.constexpr = tl.int32 if WEIGHT == tl.float32 else tl.int16
    bits = entry.to(WORD)
    where = weight_ptr + (at // columns).to(tl.int64) * tl.load(record + 3) + at % columns
    tl.store(where, bits.to(WEIGHT, bitcast=True), mask=used & (at >= 0))


@dataclass(frozen=True)
class LoraCodes:
    """What a merge keeps so that unmerge is exact: 4 bits a weight, and the escapes."""

    codes: Tensor  # uint8, two weights a byte, matrix after matrix
    merged: Tensor  # uint8 per tile
    escape: Tensor  # int64, (row * columns + column) << 32 | bits of the weight; -1 for none
    escapes: Tensor  # int32 per matrix: how many were wanted
    room: tuple[int, ...]  # how many there may be

    def failed(self) -> list[int]:
        """Matrices that were merged in part only: unmerge the group and copy those first."""
        return [
            i
            for i, (n, room) in enumerate(zip(self.escapes.tolist(), self.room, strict=True))
            if n > room
        ]

    def bits_per_weight(self, weights: list[Tensor]) -> float:
        used = self.codes.numel() + self.merged.numel() + 4 * self.escapes.numel()
        used += 8 * int(self.escapes.sum())
        return 8 * used / max(1, sum(w.numel() for w in weights))


@dataclass(frozen=True)
class _Group:
    """The tables of one launch, on the device."""

    matrices: Tensor
    parts: Tensor
    scales: Tensor
    owner: Tensor
    adapters: list[Tensor]  # referenced until the launch is over
    tiles: int
    code_bytes: int
    room: tuple[int, ...]
    aligned: bool
    kind: torch.dtype


def _group(
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    owners: list[int] | None,
    starts: list[int] | None,
) -> _Group:
    owners = list(range(len(weights))) if owners is None else owners
    starts = [0] * len(owners) if starts is None else starts
    assert len(starts) == len(owners)
    assert len(a) == len(b) == len(scales) == len(owners), "one a, b, scale and owner a part"
    assert owners == sorted(owners), "the parts of a matrix follow each other"
    first = weights[0]
    kinds = {x.dtype for x in (*a, *b)}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    if kind == torch.float64:
        kind = torch.float32
    a, b = ([x.to(kind) for x in side] for side in (a, b))
    a, b = ([x if x.stride(1) == 1 else x.contiguous() for x in side] for side in (a, b))
    matrices, parts, tiles_of = [], [], []
    code_bytes, escapes, tiles = 0, 0, 0
    aligned = True
    for i, w in enumerate(weights):
        assert w.ndim == 2 and w.stride(1) == 1, f"weight {i} {tuple(w.shape)} must be dense rows"
        assert w.dtype == first.dtype and w.device == first.device, "one dtype and device a launch"
        assert w.numel() < 2**31, f"weight {i} has 2^31 elements or more"
        rows, columns = w.shape
        mine = [j for j, owner in enumerate(owners) if owner == i]
        for j in mine:
            rank = a[j].shape[0]
            reach, start = b[j].shape[0], starts[j]
            fits = a[j].shape == (rank, columns) and b[j].shape == (reach, rank)
            assert fits and 0 <= start <= rows - reach, (
                f"weight {i} {tuple(w.shape)}, a {tuple(a[j].shape)}, b {tuple(b[j].shape)}"
                f" from row {start}"
            )
            part = (a[j].data_ptr(), b[j].data_ptr(), rank, a[j].stride(0), b[j].stride(0))
            parts.append((*part, start, reach))
            aligned = aligned and not any(x % 16 for x in part[:2])
            aligned = aligned and not any(x % 8 for x in part[2:])
        aligned = aligned and not (w.data_ptr() % 16 or w.stride(0) % 8 or columns % 16)
        begin, end = (mine[0], mine[-1] + 1) if mine else (0, 0)
        matrices.append(
            (w.data_ptr(), rows, columns, w.stride(0), tiles, begin, end, code_bytes)
            + (escapes, escape_room(w.numel()))
        )
        tiles_of.append(triton.cdiv(rows, LORA.m) * triton.cdiv(columns, LORA.n))
        tiles += tiles_of[-1]
        code_bytes += rows * ((columns + 1) // 2)
        escapes += escape_room(w.numel())

    def on_device(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(first.device)

    counts = on_device(tiles_of, torch.int64)
    indices = torch.arange(len(weights), dtype=torch.int32, device=first.device)
    return _Group(
        matrices=on_device(matrices, torch.int64),
        parts=on_device(parts or [(0,) * 7], torch.int64),
        scales=on_device(list(scales) or [0.0], torch.float32),
        owner=torch.repeat_interleave(indices, counts),
        adapters=[*a, *b],
        tiles=tiles,
        code_bytes=code_bytes,
        room=tuple(escape_room(w.numel()) for w in weights),
        aligned=aligned,
        kind=kind,
    )


def _run(group: _Group, weights: list[Tensor], codes: LoraCodes | None, merge: bool) -> None:
    device, dtype = weights[0].device, weights[0].dtype
    programs = 4
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = processors * LORA_PROGRAMS_PER_SM
    none = group.owner
    _lora_kernel[(min(group.tiles, programs),)](
        group.matrices,
        group.parts,
        group.scales,
        group.owner,
        none if codes is None else codes.codes,
        none if codes is None else codes.merged,
        none if codes is None else codes.escape,
        none if codes is None else codes.escapes,
        group.tiles,
        WEIGHT=_KINDS[dtype],
        KIND=_KINDS[group.kind],
        MERGE=merge,
        KEEP=codes is not None,
        WIDE=dtype == torch.float32,
        ALIGNED=group.aligned,
        IEEE=group.kind == torch.float32,
        M=LORA.m,
        N=LORA.n,
        RANK=LORA.rank,
        num_warps=LORA.warps,
        num_stages=LORA.stages,
        # A fused multiply-add rounds once where the code says twice, and the compiler may choose
        # differently in merge and in unmerge.
        enable_fp_fusion=False,
    )


def lora_merge_launch(
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    owners: list[int] | None = None,
    starts: list[int] | None = None,
    keep: bool = True,
) -> LoraCodes | None:
    """weights[owners[i]] += scales[i] * b[i] @ a[i], in place; all parts of a matrix at once.

    weights [out, in] of one dtype, a [rank, in], b [rows, rank] on the rows from starts[i] (0);
    owners ascend, by default one part a matrix. `keep` returns what unmerge needs; look at its
    `failed()` before it is used.
    """
    if sum(w.numel() for w in weights) == 0:
        return None
    group = _group(weights, a, b, scales, owners, starts)
    codes = None
    if keep:
        device = weights[0].device
        room = sum(group.room)
        codes = LoraCodes(
            codes=torch.empty(group.code_bytes, dtype=torch.uint8, device=device),
            merged=torch.empty(group.tiles, dtype=torch.uint8, device=device),
            escape=torch.full((room,), -1, dtype=torch.int64, device=device),
            escapes=torch.zeros(len(weights), dtype=torch.int32, device=device),
            room=group.room,
        )
    _run(group, weights, codes, merge=True)
    return codes


def lora_unmerge_launch(
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    codes: LoraCodes | None,
    owners: list[int] | None = None,
    starts: list[int] | None = None,
) -> None:
    """Takes back the merge that returned `codes`; every weight has its bits of before again."""
    if codes is None:
        assert sum(w.numel() for w in weights) == 0, "an unmerge needs the codes of its merge"
        return
    group = _group(weights, a, b, scales, owners, starts)
    _run(group, weights, codes, merge=False)
    block = 1024
    _restore_kernel[(len(weights), triton.cdiv(max(group.room), block))](
        group.matrices,
        codes.escape,
        WEIGHT=_KINDS[weights[0].dtype],
        BLOCK=block,
        num_warps=4,
    )
