"""What denoise steps cost, as measured, and how many rows of a shape to take into the next one.

A batch pays where a step of more rows takes less than as many steps of one: on a GPU that small
pictures do not fill, and never where every row costs the same. Rows that come in batches of `b` end
after c(b), 2 c(b), ... seconds per step; the `b` is taken with which the latencies of all have the
least sum. What was not measured yet, or not for long, is guessed in its favour, and thereby tried:
the first step of a size may have been slow for reasons of its own.

On a CPU steps can be made in several lanes, at the same time and with a share of the threads each.
Such a step takes longer, but others do not wait for it: again the sum of the latencies decides, by
what steps of either kind took.

Rows of one shape count one each. Where rows of different sizes share a step they count by their
tokens, and what is measured is a step of so many tokens.
"""

from __future__ import annotations

import functools
import heapq
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
_MOST_COMPANY = 16
_SMOOTH = 0.2
_EXACT = 128


@dataclass(frozen=True)
class Waiting:
    """Rows of one job, which wait for the same step."""

    params: ResolvedParams
    rows: int


@dataclass(frozen=True)
class Share:
    """How many rows a step takes, and of how many lanes it gets one: with 1 it has the device and
    all its threads to itself."""

    rows: int
    lanes: int = 1


@dataclass(eq=False)
class _Shape:
    """The steps of one shape: how many there were, and of each kind, lanes and amount in rows or in
    tokens, how long they took lately and when the last one was. `chosen` is the last share."""

    steps: int = 0
    seconds: dict[tuple[int, int], deque[float]] = field(default_factory=dict)
    last: dict[tuple[int, int], int] = field(default_factory=dict)
    typical: dict[int, dict[int, float]] = field(default_factory=dict)  # by lanes and amount
    chosen: Share | None = None

    def add(self, lanes: int, amount: int, seconds: float) -> None:
        self.steps += 1
        kind = lanes, amount
        lately = self.seconds.setdefault(kind, deque(maxlen=_WINDOW))
        lately.append(seconds)
        self.last[kind] = self.steps
        self.typical.setdefault(lanes, {})[amount] = statistics.median(lately)
        for stale in [kind for kind, last in self.last.items() if last < self.steps - _STALE]:
            del self.seconds[stale], self.last[stale], self.typical[stale[0]][stale[1]]


class Costs:
    def __init__(self) -> None:
        self._shapes: dict[ShapeKey, _Shape] = {}
        self._rate = 0.0  # seconds per step and unit of size, over all shapes

    def add(
        self, key: ShapeKey, rows: Sequence[ResolvedParams], seconds: float, lanes: int = 1
    ) -> None:
        """A step of these rows took so long."""
        if key not in self._shapes and len(self._shapes) >= _MOST_KEYS:
            del self._shapes[next(iter(self._shapes))]
        amount = sum(_amount(key, params) for params in rows)
        self._shapes.setdefault(key, _Shape()).add(lanes, _rounded(amount), seconds)
        rate = seconds / sum(_size(params) for params in rows)
        self._rate = rate if self._rate == 0 else (1 - _SMOOTH) * self._rate + _SMOOTH * rate

    def estimate(self, params: ResolvedParams) -> float:
        """About how many seconds a job takes that has the device to itself; 0 before any step."""
        steps = params.num_inference_steps - params.start_step
        return self._rate * _size(params) * steps * len(params.seeds)

    def share(
        self,
        key: ShapeKey,
        waiting: Sequence[Waiting],
        most: int,
        lanes: int = 1,
        company: int = 0,
    ) -> Share:
        """How many rows to take of those that wait, the most urgent first, and whether to make the
        step in one of so many lanes.

        Rows of one job stay together: it ends when the last of them does. The `company` are jobs
        that wait beside these or have their steps made in lanes: each counts as one row more.
        """
        ends = itertools.accumulate(one.rows for one in waiting)
        sizes = [size for size in ends if size <= most] or [most]
        each = [_amount(key, one.params) for one in waiting for _ in range(one.rows)]
        kinds = [1]
        if lanes > 1 and len(waiting) + company > 1:
            each += each[:1] * min(company, _MOST_COMPANY)
            kinds = [1, lanes]
        sums = {
            Share(size, kind): self._sum(key, each, size, kind) for kind in kinds for size in sizes
        }
        # Largest first, in lanes: without any measurement all sums are 0.
        best = min(reversed(sums), key=lambda share: sums[share])
        shape = self._shapes.get(key)
        if shape is None:
            return best
        if shape.chosen not in sums or sums[best] <= _BETTER * sums[shape.chosen]:
            shape.chosen = best
        return shape.chosen

    def seconds(self, key: ShapeKey, amount: int, lanes: int = 1) -> float:
        """Of a step with so many rows or tokens; beyond what was measured, along a line."""
        shape = self._shapes.get(key)
        known = {} if shape is None else shape.typical.get(lanes, {})
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

    def _sum(self, key: ShapeKey, each: Sequence[int], size: int, lanes: int) -> float:
        """Of the latencies, per step: batches as large as the first one, of `size` rows, one after
        the other in the lane that is free first, then the rest."""
        full = sum(each[:size])
        total, free = 0.0, [0.0] * lanes
        seconds = functools.cache(functools.partial(self.seconds, key, lanes=lanes))
        rows = amount = 0
        for more in (*each, None):
            if more is None or (rows and (amount + more > full or rows == size)):
                end = heapq.heappop(free) + seconds(amount)
                heapq.heappush(free, end)
                total += rows * end
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
