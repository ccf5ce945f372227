"""Which jobs, rows and lanes fit into the memory beside each other.

A job that was begun can always go on, one row and one unit at a time: so much room is kept for the
largest unit of all that were begun. What is beyond that goes to larger batches, and to lanes that
encode and decode beside the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sgl_diffusion.base.footprint import Footprint
from sgl_diffusion.engine.costs import Waiting
from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.job import Job

_PACKED = 2.0  # where every token has a modulation of its own a step takes more, but never so much


@dataclass(frozen=True)
class _Needs:
    """Bytes of one job: see `Footprint`."""

    kept: float
    frames: float
    encode: float
    step: float  # of one row
    decode: float
    decoding: float  # between two chunks

    @property
    def unit(self) -> float:
        return max(self.encode, self.step, self.frames + self.decode)


class Room:
    """Of one runner. Without a footprint everything fits."""

    def __init__(self) -> None:
        self.footprint: Footprint | None = None
        self._known: dict[str, _Needs] = {}

    def forget(self, job_id: str) -> None:
        self._known.pop(job_id, None)

    def fitting(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs to work on, in the order given: those that were begun, and as many others as
        fit beside them. Nobody overtakes, so everybody's turn comes."""
        if self.footprint is None:
            return list(jobs)
        begun = [job for job in jobs if job.begun]
        total = self._held(begun)
        unit = max((self._needs(job).unit for job in begun), default=0.0)
        chosen: list[Job] = []
        full = False
        for job in jobs:
            if not job.begun:
                needs = self._needs(job)
                total, unit = total + needs.kept, max(unit, needs.unit)
                alone = not begun and not chosen
                full = full or not (alone or total + unit <= self.footprint.room)
            if job.begun or not full:
                chosen.append(job)
        return chosen

    def rows(
        self,
        jobs: Iterable[Job],
        key: ShapeKey,
        waiting: Sequence[Waiting],
        most: int,
        *,
        beside: bool = True,
    ) -> int:
        """How many of the rows that wait fit into one step, beside all there is: at least one, but
        where steps are under way in lanes there may be room for none. Without `beside` it is as if
        these were done."""
        if self.footprint is None:
            return most
        jobs = list(jobs)
        pictures = max((len(job.params.images) for job in jobs), default=0)
        stepping = [job for job in jobs if job.in_lane and beside]
        least = 0 if stepping else 1
        free = self.footprint.room - self._held(jobs) - self._steps(stepping)
        if not key.packed:
            cells = math.prod(key.latents[1:])
            each = self.footprint.row_bytes(cells, key.guided, pictures)
            return max(min(most, int(free / max(each, 1.0))), least)
        fit, used, sizes = 0, 0.0, set()
        for params in (one.params for one in waiting for _ in range(one.rows)):
            used += self.footprint.row_bytes(self.footprint.cells(params), key.guided, 0)
            sizes.add((params.width, params.height))
            if fit == most or used * (_PACKED if len(sizes) > 1 else 1.0) > free:
                break
            fit += 1
        return max(fit, least)

    def lane(self, jobs: Sequence[Job], job: Job) -> bool:
        """Whether the next unit of `job`, its encoding or a chunk, fits beside the steps."""
        if self.footprint is None:
            return True
        needs = self._needs(job)
        more = needs.decode if job.encoded else needs.kept + needs.encode
        step = max((self._needs(other).step for other in jobs if other.encoded), default=0.0)
        stepping = self._steps([other for other in jobs if other.in_lane])
        return self._held(jobs) + more + max(step, stepping) <= self.footprint.room

    def _held(self, jobs: Iterable[Job]) -> float:
        """What is there between two steps: what jobs keep, and what lanes work with."""
        total = 0.0
        for job in jobs:
            if not job.begun:
                continue
            needs = self._needs(job)
            total += needs.kept
            if any(row.to_decode or row.decoded for row in job.rows):
                total += needs.frames
            decoding = sum(needs.decoding for row in job.rows if row.chunks is not None)
            if job.away == "encode":
                total += needs.encode
            elif job.away == "decode":
                decoding = max(decoding, needs.decode)
            total += decoding
        return total

    def _steps(self, jobs: Iterable[Job]) -> float:
        """Of all the rows of these jobs."""
        return sum(self._needs(job).step * len(job.to_denoise) for job in jobs)

    def _needs(self, job: Job) -> _Needs:
        assert self.footprint is not None
        needs = self._known.get(job.id)
        if needs is None:
            found, params = self.footprint, job.params
            needs = self._known[job.id] = _Needs(
                kept=found.kept(params),
                frames=found.frames(params),
                encode=found.encode_bytes(params),
                step=found.step_bytes(params),
                decode=found.decode_bytes(params),
                decoding=found.decoding_kept(params),
            )
        return needs
