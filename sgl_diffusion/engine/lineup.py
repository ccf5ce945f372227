"""What could be done next: the units of work that the present jobs have.

A unit is the encoding of one job's prompts, one denoise step of one batch, or one chunk of a
decode. Batches are stable: rows stay together, in the order of their jobs, until one leaves.
Of each shape only so many rows are encoded at a time: what a prompt becomes takes memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sgl_diffusion.engine.denoise import ShapeKey, shape_key
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.pipeline import Pipeline

BATCHES_AHEAD = 2  # encoded rows of one shape, in full batches


@dataclass(frozen=True)
class Batch:
    """A forward pass; `part` tells the batches of one key apart."""

    key: ShapeKey
    part: int


Unit = Batch | Literal["encode", "decode"]


@dataclass
class Lineup:
    """`orders` maps every unit that has work to the order of its oldest job."""

    orders: dict[Unit, int] = field(default_factory=dict)
    rows: dict[Batch, list[Row]] = field(default_factory=dict)
    to_encode: Job | None = None
    to_decode: Job | None = None


def line_up(
    pipeline: Pipeline, jobs: Iterable[Job], max_rows: int, reduced: Mapping[ShapeKey, int]
) -> Lineup:
    """The units of `jobs`, which come oldest first. A batch has at most `max_rows` rows, or fewer
    where `reduced` says so."""
    lineup = Lineup()
    groups: dict[ShapeKey, list[Row]] = defaultdict(list)
    waiting: list[Job] = []
    under_way: Counter[tuple[int, ...]] = Counter()
    for job in jobs:
        if not job.encoded:
            waiting.append(job)
            continue
        if lineup.to_decode is None and any(row.to_decode for row in job.rows):
            lineup.to_decode = job
            lineup.orders["decode"] = job.order
        for row in job.rows:
            if not row.denoised:
                groups[shape_key(pipeline, row)].append(row)
                under_way[job.shape] += 1
    for key, rows in groups.items():
        most = reduced.get(key, max_rows)
        for part, start in enumerate(range(0, len(rows), most)):
            batch = Batch(key, part)
            lineup.rows[batch] = rows[start : start + most]
            lineup.orders[batch] = rows[start].job.order
    lineup.to_encode = _next_to_encode(waiting, under_way, BATCHES_AHEAD * max_rows)
    if lineup.to_encode is not None:
        lineup.orders["encode"] = lineup.to_encode.order
    return lineup


def _next_to_encode(
    waiting: list[Job], under_way: Counter[tuple[int, ...]], most: int
) -> Job | None:
    """The oldest job whose shape has room; within a shape nobody overtakes."""
    full = set()
    for job in waiting:
        if job.shape in full:
            continue
        rows = under_way[job.shape]
        if rows == 0 or rows + len(job.rows) <= most:
            return job
        full.add(job.shape)
    return None
