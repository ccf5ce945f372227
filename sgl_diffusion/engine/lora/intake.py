"""Reading adapters in threads: a download takes minutes, and jobs go on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from sgl_diffusion.engine.lora.fit import Fitted, Source

Read = Callable[[Source], Fitted]


class Intake:
    def __init__(self, read: Read) -> None:
        self._read = read
        self._under_way: dict[Source, Future[Fitted]] = {}

    def ask(self, source: Source) -> Fitted | None:
        """The adapter when it is there; None while it is read. Raises what kept it from being."""
        outcome = self._under_way.get(source)
        if outcome is None:
            outcome = self._under_way[source] = Future()
            # A daemon: nobody waits at the end for a download.
            threading.Thread(target=self._work, args=(source, outcome), daemon=True).start()
        if not outcome.done():
            return None
        del self._under_way[source]
        return outcome.result()

    def _work(self, source: Source, outcome: Future[Fitted]) -> None:
        try:
            outcome.set_result(self._read(source))
        except BaseException as error:
            outcome.set_exception(error)
