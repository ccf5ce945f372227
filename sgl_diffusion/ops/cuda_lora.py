"""LoRA merge and unmerge on a GPU: many matrices a launch, records as the native CPU kernels' own.

A pass runs over tiles of 48 x 128 weights (csrc/include/sgld/lora_pass.h). This module makes its
tables and does what lies between two passes: the size of the codes, room for the escapes, and their
order in the record. On the CPU the same passes run tile after tile, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.ops import library, lora_truth
from sgl_diffusion.ops.lora_truth import BITS, GROUP, PANEL, ROWS, SAMPLED_PANELS, Merged
from sgl_diffusion.ops.lora_types import LoraDelta, LoraRecord

_SAMPLE, _MERGE, _UNMERGE, _COUNT, _GATHER = range(5)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Columns of the sums of a matrix; csrc/include/sgld/lora_pass.h names them.
_CHECKSUM, _TAKEN, _ESCAPED, _SUMS = 0, 1, 2, 8

Deltas = Sequence[LoraDelta]


@library.fake("lora_pass")
def _fake(*_: object) -> None:
    """A pass changes weights; it is not for tracing."""


@dataclass
class _Matrix:
    """A weight, its adapters as dense rows, and where its codes and escapes are."""

    weight: Tensor
    factors: list[tuple[Tensor, Tensor, float, int]]
    bits: int = 0
    codes: Tensor | None = None
    escapes: Tensor | None = None
    gathered: Tensor | None = None

    @property
    def blocks(self) -> int:
        return -(-self.weight.shape[0] // ROWS)

    @property
    def panels(self) -> int:
        return -(-self.weight.shape[1] // PANEL)

    @property
    def tiles(self) -> int:
        return self.blocks * self.panels

    def sample(self) -> tuple[list[int], int]:
        """The tiles that decide on the size of the codes, and how many codes they have."""
        count = min(SAMPLED_PANELS, self.tiles)
        tiles, total = [i * self.tiles // count for i in range(count)], 0
        for block, panel in (divmod(tile, self.panels) for tile in tiles):
            groups = min(PANEL // GROUP, -(-self.weight.shape[1] // GROUP) - panel * PANEL // GROUP)
            total += min(ROWS, self.weight.shape[0] - block * ROWS) * groups * GROUP
        return tiles, total

    def row(self, first_tile: int, part: int) -> list[int]:
        weight, room = self.weight, 0 if self.escapes is None else self.escapes.numel()
        codes, escapes, gathered = (
            0 if x is None else x.data_ptr() for x in (self.codes, self.escapes, self.gathered)
        )
        where = [weight.data_ptr(), *weight.shape, weight.stride(0), first_tile]
        parts = [part, part + len(self.factors)]
        return [*where, *parts, codes, self.bits, escapes, room, gathered]

    def parts(self) -> list[list[int]]:
        return [
            [down.data_ptr(), up.data_ptr(), down.shape[0], down.stride(0), up.stride(0)]
            + [start, up.shape[0], _TYPES[down.dtype], _TYPES[up.dtype]]
            for down, up, _, start in self.factors
        ]


def _matrix(weight: Tensor, deltas: Deltas) -> _Matrix:
    def dense(x: Tensor) -> Tensor:
        x = x.detach()
        return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()

    factors = [(dense(d.down), dense(d.up), float(d.scale), d.start) for d in deltas]
    return _Matrix(weight, factors)


class _Passes:
    """The tables of some matrices of one dtype, on their device."""

    def __init__(self, matrices: Sequence[_Matrix]) -> None:
        self.matrices = list(matrices)
        self.device = matrices[0].weight.device
        self.first = [0]
        for matrix in self.matrices:
            self.first.append(self.first[-1] + matrix.tiles)
        self.sums = self._table([0] * (len(self.matrices) * _SUMS), torch.int32)
        parts = [part for matrix in self.matrices for part in matrix.parts()]
        self._parts = self._table(parts, torch.int64)
        self._scales = self._table([f[2] for m in self.matrices for f in m.factors], torch.float32)
        self.owner = self.of_tiles([matrix.tiles for matrix in self.matrices])
        self.starts = torch.zeros(self.first[-1], dtype=torch.int64, device=self.device)
        self.counts = torch.zeros(self.first[-1], dtype=torch.int32, device=self.device)

    def _table(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def of_tiles(self, counts: list[int]) -> Tensor:
        """The number of its matrix, for that many tiles of each."""
        numbers = torch.arange(len(counts), dtype=torch.int32)
        return torch.repeat_interleave(numbers, torch.tensor(counts)).to(self.device)

    def run(self, mode: int, places: Tensor | None = None) -> None:
        part, rows = 0, []
        for matrix, first in zip(self.matrices, self.first, strict=False):
            rows.append(matrix.row(first, part))
            part += len(matrix.factors)
        torch.ops.sgld.lora_pass.default(
            mode,
            self.matrices[0].weight.dtype,
            self._table(rows, torch.int64),
            self._parts,
            self._scales,
            self.owner,
            self.starts,
            self.counts,
            self.starts if places is None else places,
            self.sums,
        )

    def found(self) -> list[list[int]]:
        """The sums of each matrix, as numbers without a sign."""
        rows = self.sums.view(-1, _SUMS).tolist()
        return [[value & 0xFFFFFFFF for value in row] for row in rows]

    def ends(self) -> tuple[Tensor, list[Tensor]]:
        """Where each tile's escapes begin in its matrix, and where each block's end, from 0."""
        total = torch.nn.functional.pad(self.counts.cumsum(0, dtype=torch.int64), (1, 0))
        starts = total[:-1] - total[self._table(self.first[:-1], torch.int64)][self.owner.long()]
        edges = [
            first + block * matrix.panels
            for matrix, first in zip(self.matrices, self.first, strict=False)
            for block in range(matrix.blocks + 1)
        ]
        sizes = [matrix.blocks + 1 for matrix in self.matrices]
        ends = total[self._table(edges, torch.int64)].split(sizes)
        return starts, [part - part[:1] for part in ends]


def _check_finite(deltas: Sequence[Deltas]) -> None:
    """One question to the device about all adapters."""
    every = [(i, delta) for i, some in enumerate(deltas) for delta in some]
    finite = [x.isfinite().all() for _, delta in every for x in (delta.down, delta.up)]
    answers = torch.stack(finite).tolist() if finite else []
    for n, (i, delta) in enumerate(every):
        scale = torch.tensor(delta.scale).isfinite()
        if not (answers[2 * n] and answers[2 * n + 1] and scale):
            raise ValueError(f"lora_merge_: an adapter of weight {i} is not finite")


def merge(first: Tensor, weights: Sequence[Tensor], deltas: Sequence[Deltas]) -> list[Merged]:
    """Merge weights in place; the parts of their records."""
    _check_finite(deltas)
    results: dict[int, Merged] = {}
    for dtype in dict.fromkeys(weight.dtype for weight in weights):
        chosen = [i for i, weight in enumerate(weights) if weight.dtype == dtype]
        matrices = [_matrix(weights[i], deltas[i]) for i in chosen]
        results |= dict(zip(chosen, _merge_alike(matrices), strict=True))
    return [results[i] for i in range(len(weights))]


def _merge_alike(matrices: list[_Matrix]) -> list[Merged]:
    rooms = _choose_bits(matrices)
    for matrix in matrices:
        weight = matrix.weight
        if matrix.bits == 0:
            matrix.escapes = weight.flatten().clone()
        words = -(-weight.shape[1] // GROUP) * matrix.bits
        matrix.codes = weight.new_empty((weight.shape[0], words), dtype=torch.int32)
    found: dict[int, Merged] = {}
    left = list(range(len(matrices)))
    while left:
        chosen = [matrices[i] for i in left]
        for i, matrix in zip(left, chosen, strict=True):
            if matrix.bits:
                matrix.escapes = matrix.weight.new_empty(rooms[i])
        passes = _Passes(chosen)
        passes.run(_MERGE)
        sums = passes.found()
        again = [
            n for n, matrix in enumerate(chosen) if matrix.bits and sums[n][_TAKEN] > rooms[left[n]]
        ]
        if again:  # what was merged of them is taken back, and they get the room they want
            _take_back(passes, again)
            for n in again:
                rooms[left[n]] = sums[n][_TAKEN]
        parts = _gather(passes, sums)
        found |= {left[n]: parts[n] for n in range(len(left)) if n not in again}
        left = [left[n] for n in again]
    return [found[i] for i in range(len(matrices))]


def _choose_bits(matrices: list[_Matrix]) -> list[int]:
    """Sets the size of each matrix's codes from a sample; how many escapes to expect."""
    if not (filled := [matrix for matrix in matrices if matrix.weight.numel()]):
        return [0] * len(matrices)
    passes = _Passes(filled)
    samples = [matrix.sample() for matrix in filled]
    passes.owner = passes.of_tiles([len(tiles) for tiles, _ in samples])
    starts = torch.tensor([tile for tiles, _ in samples for tile in tiles])
    passes.starts = starts.to(passes.device)
    passes.counts = passes.counts.new_zeros(len(passes.starts))
    passes.run(_SAMPLE)
    rooms = dict.fromkeys(map(id, matrices), 0)
    for matrix, (_, total), row in zip(filled, samples, passes.found(), strict=True):
        count, width = matrix.weight.numel(), 8 * matrix.weight.element_size()
        escaped = row[_ESCAPED : _ESCAPED + len(BITS)]
        matrix.bits = lora_truth.cheapest(escaped, total, width)
        share = escaped[BITS.index(matrix.bits)] / total if matrix.bits else 0.0
        rooms[id(matrix)] = min(count, int(count * (1.5 * share + 2**-7)) + 4096)
    return [rooms[id(matrix)] for matrix in matrices]


def _take_back(passes: _Passes, numbers: list[int]) -> None:
    """Unmerge the tiles that had found room, of some matrices."""
    chosen = torch.zeros(len(passes.matrices), dtype=torch.bool)
    chosen[numbers] = True
    kept = passes.starts
    passes.starts = torch.where(chosen.to(passes.device)[passes.owner.long()], kept, -1)
    passes.run(_UNMERGE)
    passes.starts = kept


def _gather(passes: _Passes, sums: list[list[int]]) -> list[Merged]:
    """Escapes from where a tile found room to the order of the record."""
    places, ends = passes.ends()
    for matrix, row in zip(passes.matrices, sums, strict=True):
        if matrix.bits:
            matrix.gathered = matrix.weight.new_empty(row[_TAKEN])
    kept = passes.counts
    # Nothing is moved of tiles without room, nor of copies.
    passes.counts = torch.where(passes.starts < 0, 0, kept)
    passes.run(_GATHER, places)
    results: list[Merged] = []
    for matrix, row, end in zip(passes.matrices, sums, ends, strict=True):
        assert matrix.codes is not None and matrix.escapes is not None
        if matrix.bits:
            assert matrix.gathered is not None
            results.append((matrix.codes, matrix.gathered, end, row[_CHECKSUM]))
        else:
            step = ROWS * matrix.weight.shape[1]
            edges = torch.arange(len(end), device=end.device) * step
            end = edges.clamp(max=matrix.weight.numel())
            results.append((matrix.codes, matrix.escapes, end, 0))
    return results


def unmerge(
    first: Tensor,
    weights: Sequence[Tensor],
    deltas: Sequence[Deltas],
    records: Sequence[LoraRecord],
) -> list[int]:
    """Restore weights in place; the checksum of each, 0 of those that were kept whole."""
    found = [0] * len(weights)
    coded: dict[torch.dtype, list[tuple[int, _Matrix]]] = {}
    for i, (weight, some, record) in enumerate(zip(weights, deltas, records, strict=True)):
        matrix = _matrix(weight, some)
        _check_record(matrix, record)
        if matrix.bits:
            coded.setdefault(weight.dtype, []).append((i, matrix))
    for weight, record in zip(weights, records, strict=True):
        if record.codes.shape[1] == 0:
            weight.copy_(record.escapes.view(weight.shape))
    for group in coded.values():
        passes = _Passes([matrix for _, matrix in group])
        passes.run(_COUNT)
        passes.starts, _ = passes.ends()
        passes.run(_UNMERGE)
        for (i, _), row in zip(group, passes.found(), strict=True):
            found[i] = row[_CHECKSUM]
    return found


def _check_record(matrix: _Matrix, record: LoraRecord) -> None:
    rows, columns = matrix.weight.shape
    codes, escapes = record.codes, record.escapes
    groups = -(-columns // GROUP)
    matrix.bits = codes.shape[1] // groups if groups else 0
    matrix.codes, matrix.escapes = codes, escapes
    known = matrix.bits in (0, *BITS) and codes.shape == (rows, groups * matrix.bits)
    dense = codes.is_contiguous() and escapes.is_contiguous() and codes.dtype == torch.int32
    whole = matrix.bits > 0 or escapes.numel() == rows * columns
    if not (known and dense and whole and codes.device == escapes.device == matrix.weight.device):
        raise ValueError(f"lora_unmerge_: a record is not one of a weight [{rows}, {columns}]")
