"""One GET over an open connection; the answer is read under caps of bytes and time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httptools

_MAX_HEADERS = 64 * 2**10
_GRACE_SECONDS = 5.0  # before the least rate counts
_CHUNK = 64 * 2**10


class AnswerError(Exception):
    """The other side speaks no HTTP that we read, or too slowly."""


class TooLargeError(Exception):
    """The body is larger than the caller takes."""


@dataclass
class Answer:
    status: int = 0
    location: str = ""
    parts: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)


class _Parser:
    """Callbacks of httptools; what they find goes into `answer`."""

    def __init__(self, max_bytes: int) -> None:
        self.answer = Answer()
        self.max_bytes = max_bytes
        self.received = 0
        self.too_large = self.encoded = self.headers_done = self.done = False
        self.framed = False  # a length or chunks say where the body ends
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key == b"location":
            self.answer.location = value.decode("latin-1")
        elif key == b"content-length":
            self.framed = True
            self.too_large |= value.isdigit() and int(value) > self.max_bytes
        elif key == b"transfer-encoding":
            self.framed = True
        elif key == b"content-encoding":
            self.encoded |= value.strip().lower() not in (b"", b"identity")

    def on_headers_complete(self) -> None:
        self.headers_done = True
        self.answer.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.received += len(data)
        self.too_large |= self.received > self.max_bytes
        if not self.too_large:
            self.answer.parts.append(data)

    def on_message_complete(self) -> None:
        self.done = True

    def is_over(self) -> bool:
        """Whether nothing more is wanted: the end, or a status whose body nobody reads."""
        return self.done or (self.headers_done and self.answer.status != 200)


async def exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    authority: str,
    path: str,
    *,
    max_bytes: int,
    min_rate: int,
) -> Answer:
    """GET `path`; AnswerError for what cannot be read, TooLargeError beyond `max_bytes`."""
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: sgl-diffusion\r\n"
        "Accept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
    )
    await writer.drain()
    parser = _Parser(max_bytes)
    began, total = time.monotonic(), 0
    while not parser.is_over():
        chunk = await reader.read(_CHUNK)
        total += len(chunk)
        if not chunk:
            if parser.headers_done and not parser.framed:
                break  # the end of the connection is the end of the body
            raise AnswerError("cut off")
        try:
            parser.parser.feed_data(chunk)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            raise AnswerError("not HTTP") from None
        if parser.too_large and parser.answer.status in (0, 200):
            raise TooLargeError
        if parser.encoded or (not parser.headers_done and total > _MAX_HEADERS):
            raise AnswerError("compressed, or endless headers")
        elapsed = time.monotonic() - began
        if elapsed > _GRACE_SECONDS and total < min_rate * elapsed:
            raise AnswerError("too slow")
    return parser.answer
