"""Rows of one batch whose sequences differ in length: each row's tokens come first, then padding.

Attention must not see the padding of others. Rows of one length that stand next to each other are a
run, and a run is a plain attention over its own tokens, for every backend and without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sgl_diffusion.attention import Attend


@dataclass(frozen=True)
class Run:
    """The rows of a batch in which the first `length` tokens count."""

    rows: slice
    length: int


def runs_of(lengths: Sequence[int], places: Sequence[int] = ()) -> tuple[Run, ...]:
    """The runs of a batch whose rows have these lengths, and, where tokens of equal rows may stand
    at different places, these."""
    runs, start = [], 0
    for (length, _), group in groupby(zip(lengths, places or lengths, strict=True)):
        count = len(list(group))
        runs.append(Run(slice(start, start + count), length))
        start += count
    return tuple(runs)


def attend_runs(attend: Attend, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    """`attend` of each row [S, H, d] over its own tokens; what stands in the padding is finite."""
    if len(runs) == 1 and runs[0].length == q.shape[1]:
        return attend(q, k, v)
    out = torch.zeros_like(q)
    for run in runs:
        part = (run.rows, slice(run.length))
        out[part] = attend(q[part], k[part], v[part])
    return out


def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    """Sequences [1, L, ...] of different lengths as one batch, zero behind the end of each."""
    most = max(row.shape[1] for row in rows)
    batch = rows[0].new_zeros(len(rows), most, *rows[0].shape[2:])
    for index, row in enumerate(rows):
        batch[index, : row.shape[1]] = row[0]
    return batch
