"""A small, lazy registry: names to values, with a helpful error for a wrong name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from sgl_diffusion.base.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """`what` names the kind of thing in error texts: "attention backend", "sampler", ..."""

    def __init__(self, what: str, entries: dict[str, T] | None = None) -> None:
        self._what = what
        self._entries: dict[str, T] = dict(entries or {})

    def add(self, name: str, value: T) -> T:
        assert name not in self._entries, f"{self._what} {name} is registered twice"
        self._entries[name] = value
        return value

    def get(self, name: str) -> T:
        if name in self._entries:
            return self._entries[name]
        raise ConfigError(f"There is no {self._what} {name!r}.", hint=suggest(name, self._entries))

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def suggest(name: str, known: Iterable[str]) -> str:
    """Either "Did you mean 'x'?" or the list of what is known."""
    names = sorted(known)
    whole = [known_name for known_name in names if name in re.split(r"[-_]", known_name)]
    if len(whole) == 1:
        return f"Did you mean {whole[0]!r}?"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names)}."
