"""One connection: uvicorn's protocol with limits on headers, time and number, and answers in our
envelope where no request has come about yet."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import Counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sgl_diffusion.base.config import LimitOptions
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.server.errors import envelope

log = get_logger(__name__)
# For what uvicorn says of a connection; what it refuses is told by a line of our own.
_uvicorn_log = get_logger(f"{__name__}.uvicorn")
_uvicorn_log.setLevel(logging.ERROR)

_LINGER_SECONDS = 1.0  # for a client that still sends when its answer is there
_READ = 2**18  # most bytes that one read can bring along


class _RefusedError(Exception):
    """Ends the parser; what to answer is in the connection."""


class GuardedConnection(HttpToolsProtocol):
    """`limits` and `rejected` belong to the class that `connection_class` makes."""

    limits: LimitOptions
    rejected: Counter[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.logger = _uvicorn_log
        self._head = 0  # bytes of the current request line and headers, as far as they are parsed
        self._raw = 0  # bytes received while they were not complete
        self._reading_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._refusal: tuple[int, str, str] | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            text = "Too many connections; --max-connections is the limit."
            self._refusal = (503, "too_many_connections", text)
            self.send_400_response("")
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._reading_head:
            self._raw += len(data)
        super().data_received(data)
        # One header that does not end is not parsed yet, and counts all the same.
        if self._reading_head and self._raw > self._max_head + _READ:
            self._too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._head = 0
        if self._head_timer is None:
            self._arm()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= self.limits.max_headers:
            text = f"More than {self.limits.max_headers} headers; see --max-headers."
            self._refusal = (431, "too_many_headers", text)
            raise _RefusedError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading_head, self._raw = False, 0
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reading_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            cycle = self.cycle
            self.loop.call_later(_LINGER_SECONDS, self._end_if_still, cycle)

    def _end_if_still(self, cycle: Any) -> None:
        """Close on a client that goes on sending a body nobody reads."""
        if self.cycle is cycle and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what never became a request, and hang up."""
        refusal = self._refusal or (400, "invalid_http", "This is not a valid HTTP request.")
        status, code, text = refusal
        body = json.dumps(envelope(status, text, code)).encode()
        request_id = f"req_{secrets.token_hex(12)}"
        self.rejected[code] += 1
        fields = {"request_id": request_id, "status": status, "code": code}
        log.info("no request", extra={"fields": fields})
        phrase = {503: "Service Unavailable", 431: "Request Header Fields Too Large"}
        lines = [
            f"HTTP/1.1 {status} {phrase.get(status, 'Bad Request')}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"x-request-id: {request_id}",
            "x-content-type-options: nosniff",
            *(["retry-after: 1"] if status == 503 else []),
            "connection: close",
        ]
        self._disarm()
        self._refused = True
        self.connections.discard(self)
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        # Closing on unread data would reset the connection, and the answer would be lost.
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    @property
    def _max_head(self) -> int:
        return self.limits.max_header_kb * 1024

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > self._max_head:
            self._too_large()
            raise _RefusedError

    def _too_large(self) -> None:
        text = f"The headers are larger than {self.limits.max_header_kb} kB; see --max-header-kb."
        self._refusal = (431, "headers_too_large", text)

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout, self._late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if not self._raw:
            self.transport.close()
            return
        text = "The headers did not come in time; see --header-timeout."
        self._refusal = (400, "headers_too_slow", text)
        self.send_400_response("")


def connection_class(limits: LimitOptions, rejected: Counter[str]) -> type[GuardedConnection]:
    """The protocol class that uvicorn makes its connections of; what they refuse is counted."""
    return type("Connection", (GuardedConnection,), {"limits": limits, "rejected": rejected})
