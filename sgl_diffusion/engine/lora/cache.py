"""Loaded adapters within a budget of bytes: the one that was not used for longest makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set

from sgl_diffusion.base.errors import ConflictError, RequestError
from sgl_diffusion.engine.lora.fit import Fitted, Source


class AdapterCache:
    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._kept: OrderedDict[Source, Fitted] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(fitted.nbytes for fitted in self._kept.values())

    def get(self, source: Source) -> Fitted | None:
        fitted = self._kept.get(source)
        if fitted is not None:
            self._kept.move_to_end(source)
        return fitted

    def peek(self, source: Source) -> Fitted | None:
        """The adapter without counting it as used."""
        return self._kept.get(source)

    def put(self, fitted: Fitted, pinned: Set[Source]) -> None:
        """Keep it, at the cost of others, but not of those that are in use."""
        name = fitted.source.nickname
        if fitted.nbytes > self.budget:
            raise RequestError(
                f"The adapter {name!r} takes {_mib(fitted.nbytes)}; all adapters together may take "
                f"{_mib(self.budget)}.",
                hint="Start the server with a larger --max-lora-memory.",
                code="lora_memory_full",
            )
        self._kept.pop(fitted.source, None)
        over = self.nbytes + fitted.nbytes - self.budget
        leaving = []
        for source, other in self._kept.items():
            if over <= 0:
                break
            if source not in pinned:
                leaving.append(source)
                over -= other.nbytes
        if over > 0:
            raise ConflictError(
                f"There is no room for the adapter {name!r}: it takes {_mib(fitted.nbytes)}, and "
                f"those in use leave too little of {_mib(self.budget)}.",
                hint="Wait for jobs that use others, or raise --max-lora-memory.",
                code="lora_memory_full",
            )
        for source in leaving:
            del self._kept[source]
        self._kept[fitted.source] = fitted

    def drop(self, source: Source) -> None:
        self._kept.pop(source, None)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
