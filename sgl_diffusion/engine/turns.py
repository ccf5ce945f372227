"""Whose turn is it: groups of jobs share the time of the device, not the number of turns.

Each group has a clock that runs while it is served, slower the more weight it has; the one that is
furthest behind is next. Whoever comes new begins behind the others by their longest unit of work:
so a short job waits for the one unit that is under way and, if its own work is shorter than such a
unit, for nothing else. It has that lead once, however often it comes back.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from typing import Protocol, TypeVar

_MOST_KNOWN = 256


class Taker(Protocol):
    @property
    def weight(self) -> float: ...

    @property
    def order(self) -> int: ...


T = TypeVar("T", bound=Hashable)


class Turns:
    def __init__(self) -> None:
        self._clocks: dict[Hashable, float] = {}
        self._longest: dict[Hashable, float] = {}
        self._active: set[Hashable] = set()

    def next(self, takers: Mapping[T, Taker], elsewhere: Set[Hashable] = frozenset()) -> T:
        """The group that had the least time for its weight; of equals, that of the oldest job.
        Groups that are at work `elsewhere` do not come new when they are back."""
        present = self._active & (takers.keys() | elsewhere)
        if present:
            front = min(self._clocks[taker] for taker in present)
            lead = max(self._longest[taker] for taker in present)
            for taker in takers.keys() - present:
                begin = front - lead / takers[taker].weight
                self._clocks[taker] = max(self._clocks.get(taker, begin), begin)
        else:
            self._clocks, self._longest = dict.fromkeys(takers, 0.0), {}
        for taker in takers:
            self._longest.setdefault(taker, 0.0)
        self._active = takers.keys() | present
        self._forget()
        return min(takers, key=lambda taker: (self._clocks[taker], takers[taker].order))

    def spent(self, taker: Hashable, seconds: float, weight: float) -> None:
        """A unit of this group took so long."""
        if taker in self._clocks:
            self._clocks[taker] += seconds / weight
            self._longest[taker] = max(seconds, 0.9 * self._longest[taker])

    def _forget(self) -> None:
        for taker in list(self._clocks):
            if len(self._clocks) <= _MOST_KNOWN:
                break
            if taker not in self._active:
                del self._clocks[taker], self._longest[taker]
