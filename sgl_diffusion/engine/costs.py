"""What denoise steps cost, as measured, and how many rows of a shape to take into the next one.

A batch pays where a step of more rows takes less than as many steps of one: on a GPU that small
pictures do not fill, and never where every row costs the same. Rows that come in batches of `b` end
after c(b), 2 c(b), ... seconds per step; the `b` is taken with which the latencies of all have the
least sum. What was not measured yet, or not for long, is guessed in its favour, and thereby tried:
the first step of a size may have been slow for reasons of its own.

Rows of one shape count one each. Where rows of different sizes share a step they count by their
tokens, and what is measured is a step of so many tokens.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.packing import tokens

_WINDOW = 5  # steps of which the median counts
_BETTER = 0.95  # another size of batches must promise so much less, or the last one stays
_STALE = 1000  # steps of a shape after which another size of batches is tried again
_MOST_KEYS = 64
_SMOOTH = 0.2
_EXACT = 128


@dataclass(frozen=True)
class Waiting:
    """Rows of one job, which wait for the same step."""

    params: ResolvedParams
    rows: int


@dataclass(eq=False)
class _Shape:
    """The steps of one shape: how many there were, and of each amount, in rows or in tokens, how
    long they took lately and when the last one was. `chosen` are the rows of the last batch."""

    steps: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    chosen: int | None = None

    def add(self, amount: int, seconds: float) -> None:
        self.steps += 1
        self.seconds.setdefault(amount, deque(maxlen=_WINDOW)).append(seconds)
        self.last[amount] = self.steps
        for size in [size for size, last in self.last.items() if last < self.steps - _STALE]:
            del self.seconds[size], self.last[size]


class Costs:
    def __init__(self) -> None:
        self._shapes: dict[ShapeKey, _Shape] = {}
        self._rate = 0.0  # seconds per step and unit of size, over all shapes

    def add(self, key: ShapeKey, rows: Sequence[ResolvedParams], seconds: float) -> None:
        """A step of these rows took so long."""
        if key not in self._shapes and len(self._shapes) >= _MOST_KEYS:
            del self._shapes[next(iter(self._shapes))]
        amount = sum(_amount(key, params) for params in rows)
        self._shapes.setdefault(key, _Shape()).add(_rounded(amount), seconds)
        rate = seconds / sum(_size(params) for params in rows)
        self._rate = rate if self._rate == 0 else (1 - _SMOOTH) * self._rate + _SMOOTH * rate

    def estimate(self, params: ResolvedParams) -> float:
        """About how many seconds a job takes that has the device to itself; 0 before any step."""
        steps = params.num_inference_steps - params.start_step
        return self._rate * _size(params) * steps * len(params.seeds)

    def rows(self, key: ShapeKey, waiting: Sequence[Waiting], most: int) -> int:
        """How many rows to take of those that wait, the most urgent first.

        Rows of one job stay together: it ends when the last of them does.
        """
        ends = itertools.accumulate(one.rows for one in waiting)
        sizes = [size for size in ends if size <= most] or [most]
        each = [_amount(key, one.params) for one in waiting for _ in range(one.rows)]
        sums = {size: self._sum(key, each, size) for size in sizes}
        # Largest first: without any measurement all sums are 0.
        best = min(reversed(sizes), key=lambda size: sums[size])
        shape = self._shapes.get(key)
        if shape is None:
            return best
        if shape.chosen not in sums or sums[best] <= _BETTER * sums[shape.chosen]:
            shape.chosen = best
        return shape.chosen

    def seconds(self, key: ShapeKey, amount: int) -> float:
        """Of a step with so many rows or tokens; beyond what was measured, along a line."""
        shape = self._shapes.get(key)
        known = {} if shape is None else {n: statistics.median(s) for n, s in shape.seconds.items()}
        if amount in known or not known:
            return known.get(amount, 0.0)
        below = sorted(size for size in known if size < amount)
        above = sorted(size for size in known if size > amount)
        if not below:
            return known[above[0]] * amount / above[0]
        near = below[-1]
        slope = 0.0
        if len(below) > 1:
            slope = (known[near] - known[below[-2]]) / (near - below[-2])
        if above:
            between = (known[above[0]] - known[near]) / (above[0] - near)
            # Tokens are many, and what was measured may be far off: so the line from below is a
            # guess, too, and again the lower one is tried.
            slope = min(slope, between) if key.packed else between
        return known[near] + max(slope, 0.0) * (amount - near)

    def _sum(self, key: ShapeKey, each: Sequence[int], size: int) -> float:
        """Of the latencies, per step: batches as large as the first one, of `size` rows, one after
        the other, then the rest."""
        full = sum(each[:size])
        total = now = 0.0
        rows = amount = 0
        for more in (*each, None):
            if more is None or (rows and (amount + more > full or rows == size)):
                now += self.seconds(key, amount)
                total += rows * now
                rows = amount = 0
            rows, amount = rows + 1, amount + (more or 0)
        return total


def _amount(key: ShapeKey, params: ResolvedParams) -> int:
    return tokens(params) if key.packed else 1


def _rounded(amount: int) -> int:
    """To four bits: sums of tokens are hardly ever the same twice. Numbers of rows stay."""
    shift = max(amount.bit_length() - 4, 0) if amount > _EXACT else 0
    return (amount + (1 << shift >> 1)) >> shift << shift


def _size(params: ResolvedParams) -> int:
    """What the time of a step is about proportional to: pixels, of every fourth frame."""
    return params.width * params.height * ((params.num_frames - 1) // 4 + 1)
