"""What the start of a worker takes its time for.

Whoever starts one measures; whoever does something of it says what, in the same thread, wherever
that is called from. Time that is spent on one thing within another is that one's alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

OTHER = "other"  # what nobody named


class Spent:
    """Seconds by what they were spent on, in the order in which that began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()

    def enter(self, name: str) -> None:
        self._count()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)

    def leave(self) -> None:
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = time.monotonic()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


_current: ContextVar[Spent | None] = ContextVar("spent", default=None)


@contextmanager
def measuring() -> Iterator[dict[str, float]]:
    """What the time inside is spent on, complete when it is left."""
    spent = Spent()
    token = _current.set(spent)
    found: dict[str, float] = {}
    spent.enter(OTHER)
    try:
        yield found
    finally:
        spent.leave()
        _current.reset(token)
        other = spent.seconds.pop(OTHER)
        found.update(spent.seconds | {OTHER: other})


@contextmanager
def spent_on(name: str) -> Iterator[None]:
    """The time inside is spent on this, if it is being measured."""
    spent = _current.get()
    if spent is None:
        yield
        return
    spent.enter(name)
    try:
        yield
    finally:
        spent.leave()


def told(spent: dict[str, float]) -> str:
    """In one line."""
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items())
