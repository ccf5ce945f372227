"""What denoise steps cost, as measured, and how many rows of a shape to take into the next one.

A batch pays where a step of more rows takes less than as many steps of one: on a GPU that small
pictures do not fill, and never where every row costs the same. Rows that come in batches of `b` end
after c(b), 2 c(b), ... seconds per step; the `b` is taken with which the latencies of all have the
least sum. What was not measured yet, or not for long, is guessed in its favour, and thereby tried:
the first step of a size may have been slow for reasons of its own.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.denoise import ShapeKey

_WINDOW = 5  # steps of which the median counts
_BETTER = 0.95  # another size of batches must promise so much less, or the last one stays
_STALE = 1000  # steps of a shape after which another size of batches is tried again
_MOST_KEYS = 64
_SMOOTH = 0.2


@dataclass(eq=False)
class _Shape:
    """The steps of one shape: how many there were, and of each number of rows how long they took
    lately and when the last one was. `chosen` is the size of the last batch."""

    steps: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    chosen: int | None = None

    def add(self, rows: int, seconds: float) -> None:
        self.steps += 1
        self.seconds.setdefault(rows, deque(maxlen=_WINDOW)).append(seconds)
        self.last[rows] = self.steps
        for size in [size for size, last in self.last.items() if last < self.steps - _STALE]:
            del self.seconds[size], self.last[size]


class Costs:
    def __init__(self) -> None:
        self._shapes: dict[ShapeKey, _Shape] = {}
        self._rate = 0.0  # seconds per step and unit of size, over all shapes

    def add(self, key: ShapeKey, params: ResolvedParams, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if key not in self._shapes and len(self._shapes) >= _MOST_KEYS:
            del self._shapes[next(iter(self._shapes))]
        self._shapes.setdefault(key, _Shape()).add(rows, seconds)
        rate = seconds / (rows * _size(params))
        self._rate = rate if self._rate == 0 else (1 - _SMOOTH) * self._rate + _SMOOTH * rate

    def estimate(self, params: ResolvedParams) -> float:
        """About how many seconds a job takes that has the device to itself; 0 before any step."""
        steps = params.num_inference_steps - params.start_step
        return self._rate * _size(params) * steps * len(params.seeds)

    def rows(self, key: ShapeKey, jobs: Sequence[int], most: int) -> int:
        """How many rows to take of jobs with so many rows each, the most urgent first.

        Rows of one job stay together: it ends when the last of them does.
        """
        sizes = [size for size in itertools.accumulate(jobs) if size <= most] or [most]
        waiting = max(sum(jobs), sizes[-1])
        sums = {size: self._sum(key, size, waiting) for size in sizes}
        # Largest first: without any measurement all sums are 0.
        best = min(reversed(sizes), key=lambda size: sums[size])
        shape = self._shapes.get(key)
        if shape is None:
            return best
        if shape.chosen not in sums or sums[best] <= _BETTER * sums[shape.chosen]:
            shape.chosen = best
        return shape.chosen

    def seconds(self, key: ShapeKey, rows: int) -> float:
        """Of a step with so many rows; between and beyond what was measured, along a line."""
        shape = self._shapes.get(key)
        known = {} if shape is None else {n: statistics.median(s) for n, s in shape.seconds.items()}
        if rows in known or not known:
            return known.get(rows, 0.0)
        below = sorted(size for size in known if size < rows)
        above = sorted(size for size in known if size > rows)
        if not below:
            return known[above[0]] * rows / above[0]
        near = below[-1]
        if above:
            slope = (known[above[0]] - known[near]) / (above[0] - near)
        elif len(below) > 1:
            slope = (known[near] - known[below[-2]]) / (near - below[-2])
        else:
            slope = 0.0
        return known[near] + max(slope, 0.0) * (rows - near)

    def _sum(self, key: ShapeKey, size: int, waiting: int) -> float:
        """Of the latencies, per step: full batches one after the other, then the rest."""
        full, rest = divmod(waiting, size)
        whole = self.seconds(key, size)
        last = self.seconds(key, rest) if rest else 0.0
        return whole * size * full * (full + 1) / 2 + rest * (full * whole + last)


def _size(params: ResolvedParams) -> int:
    """What the time of a step is about proportional to: pixels, of every fourth frame."""
    return params.width * params.height * ((params.num_frames - 1) // 4 + 1)
