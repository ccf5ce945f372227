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
_Name = tuple[str, str]  # of an owner, and of a request within his
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
        self._most_bytes = kept_bytes
        self._by_key: dict[_Name, _Flight] = {}
        self._by_body: dict[_Name, list[_Flight]] = {}
        self._landed: dict[_Flight, None] = {}  # those with an answer, the first to land first
        self._bytes = 0  # of these answers

    async def answer(
        self, request: Request, origin: Origin, make: Callable[[], Coroutine[Any, Any, Answer]]
    ) -> Answer | None:
        """What `make` returns, or returned to the same request; None if the client went away."""
        self._forget_old()
        flight = self._find(origin) if origin.repeatable else None
        if flight is None:
            flight = _Flight(origin, asyncio.create_task(make()))
            self._add(flight)
            flight.task.add_done_callback(lambda _: self._land(flight))
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
        if origin.key is None:
            known = self._by_body.get((origin.owner, origin.body_hash), [])
            return next((flight for flight in reversed(known) if not flight.over()), None)
        flight = self._by_key.get((origin.owner, origin.key))
        if flight is None or flight.over():
            return None
        if flight.origin.body_hash != origin.body_hash:
            raise key_reused()
        return flight

    def _add(self, flight: _Flight) -> None:
        origin = flight.origin
        self._by_body.setdefault((origin.owner, origin.body_hash), []).append(flight)
        if origin.key is not None:
            self._by_key[origin.owner, origin.key] = flight

    def _land(self, flight: _Flight) -> None:
        if flight.over():
            self._forget(flight)
            return
        entries = flight.task.result()["data"]
        flight.bytes = sum(len(entry["b64_json"] or b"") for entry in entries)
        self._landed[flight] = None
        self._bytes += flight.bytes
        while self._landed and (self._bytes > self._most_bytes or len(self._landed) > _KEPT):
            self._forget(next(iter(self._landed)))

    def _forget_old(self) -> None:
        while self._landed and (first := next(iter(self._landed))).over():
            self._forget(first)

    def _forget(self, flight: _Flight) -> None:
        origin = flight.origin
        body, key = (origin.owner, origin.body_hash), (origin.owner, origin.key or "")
        same = self._by_body[body]
        same.remove(flight)
        if not same:
            del self._by_body[body]
        if self._by_key.get(key) is flight:
            del self._by_key[key]
        if flight in self._landed:
            del self._landed[flight]
            self._bytes -= flight.bytes
