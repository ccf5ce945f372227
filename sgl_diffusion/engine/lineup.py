"""What could be done next: one unit of work of each group of jobs.

A unit is the encoding of one job's prompts, one denoise step of one batch, or one chunk of a
decode. The jobs of a group have one size, or sizes that can be packed, and compete for the same
batches; in it, whoever has the earliest deadline goes first. What is nearest to its end goes before
everything else, so that the group finishes jobs rather than begins them; and only those are encoded
that the next batch takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sgl_diffusion.engine.costs import Share, Waiting
from sgl_diffusion.engine.denoise import ShapeKey, shape_key
from sgl_diffusion.engine.errand import Lane
from sgl_diffusion.engine.job import Group, Job, Row
from sgl_diffusion.engine.pipeline import Pipeline

_MOST_WEIGHT = 8.0  # jobs of usual priority that count for their group: no crowd takes everything


@dataclass(frozen=True, eq=False)
class Encode:
    job: Job


@dataclass(frozen=True, eq=False)
class Decode:
    job: Job


@dataclass(frozen=True, eq=False)
class Batch:
    """A forward pass, in one of so many lanes, or with the device to itself."""

    key: ShapeKey
    rows: tuple[Row, ...]
    lanes: int = 1

    @property
    def job(self) -> Job:
        """Of its most urgent row."""
        return self.rows[0].job

    @property
    def jobs(self) -> list[Job]:
        return list({row.job.id: row.job for row in self.rows}.values())


Unit = Encode | Decode | Batch

# From a key and the rows of jobs that wait, the most urgent first, to how many to take, and where.
Shares = Callable[[ShapeKey, Sequence[Waiting]], Share]


@dataclass(frozen=True)
class Offer:
    """What a group would do next, and what instead if its encoding and decoding go on beside it:
    only steps, as long as there are any. With it, the share of the time it should have, and its
    oldest job."""

    next: Unit
    beside: Unit | None
    weight: float
    order: int


def lane_of(unit: Encode | Decode) -> Lane:
    """The lane that does such a unit beside the steps."""
    return "encode" if isinstance(unit, Encode) else "decode"


def first_jobs(jobs: Iterable[Job], most: int) -> list[Job]:
    """The jobs to work on, by deadline; with a limit, those that have begun stay."""
    if most:
        jobs = sorted(jobs, key=lambda job: (not job.encoded, job.deadline, job.order))[:most]
    return sorted(jobs, key=lambda job: (job.deadline, job.order))


def line_up(pipeline: Pipeline, jobs: Iterable[Job], shares: Shares) -> dict[Group, Offer]:
    """The offers of all groups that can do something now; `jobs` come by deadline."""
    groups: dict[Group, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    offers = {}
    for group, members in groups.items():
        decode = next((Decode(j) for j in members if j.to_decode and j.away != "decode"), None)
        able = [
            job
            for job in members
            if (job.to_denoise or not job.encoded) and job.away != "encode" and not job.in_lane
        ]
        step = _next_step(pipeline, able, shares)
        beside: Encode | Batch | None = step
        # Where the steps are, there are the adapters.
        if isinstance(step, Encode) and step.job.blend is None:
            beside = _next_step(pipeline, [job for job in able if job.encoded], shares)
        unit = decode or step
        if unit is not None:
            weight = min(sum(job.weight for job in members), _MOST_WEIGHT)
            order = min(job.order for job in members)
            offers[group] = Offer(unit, beside, weight, order)
    return offers


def next_to_encode(jobs: Iterable[Job], most: int) -> Job | None:
    """The most urgent job that could be encoded before its turn, in another thread: of each group
    `most` rows hold their prompts, at most, and adapters are where the steps are."""
    held: Counter[Group] = Counter()
    jobs = list(jobs)
    for job in jobs:
        if job.encoded:
            held[job.group] += len(job.to_denoise)
    for job in jobs:
        if job.encoded or job.away or job.blend is not None:
            continue
        if held[job.group] == 0 or held[job.group] + len(job.rows) <= most:
            return job
        held[job.group] += most  # within a group nobody overtakes
    return None


def _next_step(pipeline: Pipeline, jobs: Sequence[Job], shares: Shares) -> Encode | Batch | None:
    """The next step of `jobs`, or the encoding of one that it should have."""
    if not jobs:
        return None
    first = next((job for job in jobs if job.apart), jobs[0])  # so that it soon has company again
    if not first.encoded:
        return Encode(first)
    key = shape_key(pipeline, first.to_denoise[0])
    if key.alone:
        return Batch(key, (first.to_denoise[0],))
    waiting = []  # by job; whoever is not encoded yet could have this key
    for job in [first] if first.apart else jobs:
        if job.params.enable_teacache or (job.apart and job is not first):
            continue
        fit = [row for row in job.to_denoise if not job.encoded or shape_key(pipeline, row) == key]
        if fit:
            waiting.append(fit)
    share = shares(key, [Waiting(fit[0].job.params, len(fit)) for fit in waiting])
    taken: list[Row] = []
    for fit in waiting:
        if len(taken) >= share.rows:
            break
        if not fit[0].job.encoded:
            return Encode(fit[0].job)
        taken += fit
    batch = tuple(taken[: share.rows])
    # Adapters are where the steps of the whole device are.
    plain = all(row.job.blend is None for row in batch)
    return Batch(key, batch, share.lanes if plain else 1)
