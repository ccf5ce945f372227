"""What breaks in one row of a batch ends that row, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

R = TypeVar("R")


@contextmanager
def alone(row: R, fail: Callable[[R, Exception], None]) -> Iterator[None]:
    """Whatever is raised within goes to `fail`, with the row that it is about."""
    try:
        yield
    except Exception as error:
        fail(row, error)
