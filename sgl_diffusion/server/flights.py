"""Image requests on their way: one piece of work per logical call, however often it is sent.

A repeated request joins the work that its first sending began, or gets the answer of it. Work that
nobody waits for any longer is cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from sgl_diffusion.orchestrator.jobtable import RETRY_SECONDS, key_reused
from sgl_diffusion.server.repeats import Origin

Answer = dict[str, Any]
_KEPT_BYTES = 64 * 2**20
_KEPT = 256


@dataclass(eq=False)
class _Flight:
    origin: Origin
    task: asyncio.Task[Answer]
    began: float = field(default_factory=time.monotonic)
    waiters: int = 0
    bytes: int = 0

    def over(self) -> bool:
        """Whether nobody can get an answer from it any more."""
        if not self.task.done():
            return False
        failed = self.task.cancelled() or self.task.exception() is not None
        return failed or time.monotonic() - self.began > RETRY_SECONDS


class Flights:
    """Answers are kept for ten minutes, as far as `kept_bytes` reach and 256 of them at most."""

    def __init__(self, kept_bytes: int = _KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._flights: list[_Flight] = []

    async def answer(
        self, request: Request, origin: Origin, make: Callable[[], Coroutine[Any, Any, Answer]]
    ) -> Answer | None:
        """What `make` returns, or returned to the same request; None if the client went away."""
        self._flights = [flight for flight in self._flights if not flight.over()]
        flight = self._find(origin) if origin.repeatable else None
        if flight is None:
            flight = _Flight(origin, asyncio.create_task(make()))
            self._flights.append(flight)
            flight.task.add_done_callback(lambda _: self._landed(flight))
        flight.waiters += 1
        # The body is read, so the next message can only be the end of the connection.
        gone = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({flight.task, gone}, return_when=asyncio.FIRST_COMPLETED)
            return flight.task.result() if flight.task.done() else None
        finally:
            flight.waiters -= 1
            gone.cancel()
            if not flight.waiters and not flight.task.done():
                flight.task.cancel()
                await asyncio.wait({flight.task})
            await asyncio.gather(gone, return_exceptions=True)

    def _find(self, origin: Origin) -> _Flight | None:
        for flight in reversed(self._flights):
            known = flight.origin
            if known.owner != origin.owner:
                continue
            if origin.key is not None and known.key == origin.key:
                if known.body_hash != origin.body_hash:
                    raise key_reused()
                return flight
            if origin.key is None and origin.retried and known.body_hash == origin.body_hash:
                return flight
        return None

    def _landed(self, flight: _Flight) -> None:
        if flight.over():
            self._flights = [known for known in self._flights if known is not flight]
            return
        entries = flight.task.result()["data"]
        flight.bytes = sum(len(entry["b64_json"] or "") for entry in entries)
        landed = [known for known in self._flights if known.task.done()]
        total = sum(known.bytes for known in landed)
        while landed and (total > self._kept_bytes or len(landed) > _KEPT):
            oldest = landed.pop(0)
            self._flights.remove(oldest)
            total -= oldest.bytes
