"""Which forward passes become graphs and which graphs are kept. Knows nothing of any device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

G = TypeVar("G")

# About what the host takes to launch one kernel from Python: 8 to 15 microseconds.
LAUNCH_SECONDS = 15e-6
# What adapters are copied with, on a device of today: a third of what its memory does, or less.
COPY_BYTES_PER_SECOND = 300e9
EAGER_STEPS = 3  # before a shape is captured: the first of a shape may compile and tune
_MOST_SHAPES = 256


def pays(step_seconds: float, kernels: int) -> bool:
    """Whether a step waits for the host: its kernels take less, on average, than a launch."""
    return kernels > 0 and step_seconds / kernels < LAUNCH_SECONDS


def copies_pay(adapter_bytes: int, layers: int) -> bool:
    """Whether an adapter of so many layers is copied to where graphs read it in less time than the
    host takes to apply it: a launch or more for each layer. So a graph is never the slower way,
    even if every step brings another adapter."""
    return adapter_bytes / COPY_BYTES_PER_SECOND < layers * LAUNCH_SECONDS


@dataclass
class _Shape:
    steps: int = 0
    seconds: float = float("inf")  # of the fastest step
    kernels: int = 0
    refused: bool = False


@dataclass
class _Kept:
    what: Any
    size: int
    graph: bool
    reads: Hashable = None  # the key of what else the graph reads


class Plan(Generic[G]):
    """Graphs by key, the one used last at the end, and what they share with others; together they
    take `budget` bytes at most.

    With `always` every shape that comes again is captured, else those for which it `pays`.
    """

    def __init__(self, budget: int, *, always: bool = False) -> None:
        self._budget = budget
        self._always = always
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(kept.size for kept in self._kept.values())

    def __len__(self) -> int:
        return sum(kept.graph for kept in self._kept.values())

    def get(self, key: Hashable) -> G | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        if found.reads is not None:
            self._kept.move_to_end(found.reads)  # so that it never goes before its graphs
        graph: G = found.what
        return graph

    def shared(self, key: Hashable) -> Any:
        """What was put there for graphs to read, or None."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return None if found is None else found.what

    def takes_adapters(self, count: int, adapter_bytes: int, layers: int) -> bool:
        """Whether graphs read so many adapters from copies, of which each has such a size. Half of
        the budget stays for the graphs."""
        if 2 * count * adapter_bytes > self._budget:
            return False
        return self._always or copies_pay(adapter_bytes, layers)

    def counts(self, key: Hashable) -> bool:
        """Whether the next eager step of this shape is the one whose kernels are to be counted."""
        shape = self._shapes.get(key)
        return not self._always and shape is not None and shape.steps == 1 and not shape.refused

    def counted(self, key: Hashable, kernels: int) -> None:
        self._shapes[key].kernels = kernels

    def ran(self, key: Hashable, seconds: float) -> None:
        """An eager step of this shape is over; it took so long."""
        shape = self._shapes.setdefault(key, _Shape())
        self._shapes.move_to_end(key)
        shape.steps += 1
        if shape.steps > 2:  # the first warms up, the second is slowed down by the counting
            shape.seconds = min(shape.seconds, seconds)
        if len(self._shapes) > _MOST_SHAPES:
            self._shapes.popitem(last=False)

    def due(self, key: Hashable) -> bool:
        """Whether a graph of this shape should be made now."""
        shape = self._shapes.get(key)
        if shape is None or shape.refused or key in self._kept or shape.steps < EAGER_STEPS:
            return False
        return self._always or pays(shape.seconds, shape.kernels)

    def refuse(self, key: Hashable) -> None:
        """It could not be captured: no second attempt."""
        self._shapes.setdefault(key, _Shape()).refused = True

    def put(self, key: Hashable, graph: G, size: int, reads: Hashable = None) -> int:
        """Keep a graph and let go of those used longest ago, until all fit: so many. One that is
        larger than the budget is not kept. What it `reads` is kept already, and counted there."""
        beside = 0 if reads is None else self._kept[reads].size
        if size + beside > self._budget:
            self.refuse(key)
            return 0
        gone = self._make_room(size)
        self._kept[key] = _Kept(graph, size, True, reads)
        if reads is not None:
            self._kept.move_to_end(reads)
        return gone

    def share(self, key: Hashable, what: Any, size: int) -> int:
        """Keep what graphs read; so many graphs made room for it."""
        assert size <= self._budget, "ask before whether it is taken"
        gone = self._make_room(size)
        self._kept[key] = _Kept(what, size, False)
        return gone

    def _make_room(self, size: int) -> int:
        gone = 0
        while self._kept and self.bytes + size > self._budget:
            _, kept = self._kept.popitem(last=False)
            gone += kept.graph
        return gone

    def clear(self) -> None:
        """Give the memory of all back."""
        self._kept.clear()
