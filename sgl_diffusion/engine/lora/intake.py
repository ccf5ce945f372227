"""Reading adapters in threads: a download takes minutes, and jobs go on meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from sgl_diffusion.engine.lora.fit import Fitted, Source

Read = Callable[[Source], Fitted]

AT_ONCE = 4
UNCLAIMED_SECONDS = 5.0


@dataclass(eq=False)
class _Reading:
    asked: float = 0.0
    outcome: Future[Fitted] = field(default_factory=Future)

    @property
    def unclaimed(self) -> bool:
        """Whether it is done, and whoever wanted it has not asked for long."""
        return self.outcome.done() and time.monotonic() - self.asked > UNCLAIMED_SECONDS


class Intake:
    """Reads at most `AT_ONCE` files at a time: each may become as large as the whole cache."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._under_way: dict[Source, _Reading] = {}

    def ask(self, source: Source) -> Fitted | None:
        """The adapter when it is there; None while it is read, or waits for its turn. Raises what
        kept it from being."""
        reading = self._under_way.get(source)
        if reading is None:
            self._under_way = {s: r for s, r in self._under_way.items() if not r.unclaimed}
            if len(self._under_way) >= AT_ONCE:
                return None
            reading = self._under_way[source] = _Reading()
            # A daemon: nobody waits at the end for a download.
            threading.Thread(target=self._work, args=(source, reading.outcome), daemon=True).start()
        reading.asked = time.monotonic()
        if not reading.outcome.done():
            return None
        del self._under_way[source]
        return reading.outcome.result()

    def _work(self, source: Source, outcome: Future[Fitted]) -> None:
        try:
            outcome.set_result(self._read(source))
        except BaseException as error:
            outcome.set_exception(error)
