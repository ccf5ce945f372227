"""Server-sent events: frames, keep-alives, and the error that comes after the first byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sgl_diffusion.base.errors import SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.server.errors import INTERNAL, envelope, status_of

log = get_logger(__name__)

T = TypeVar("T")

PING = b": ping\n\n"
PING_SECONDS = 15.0
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class EventStream(StreamingResponse):
    """The answer that `frames` make. `close` is called at its end, however that comes: the client
    may leave before the first frame is asked for."""

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncIterator[bytes], close: Callable[[], None] | None = None
    ) -> None:
        super().__init__(_until_error(frames), headers=_HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._close is not None:
                self._close()


def frame(data: Mapping[str, Any]) -> bytes:
    """One event; its name is the `type` of its data. Bytes become base64."""
    text = msgspec.json.encode(data)
    if not text.isascii():  # some readers end a line where other alphabets have a separator
        text = json.dumps(msgspec.json.decode(text)).encode()
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), text)


def comment(data: Mapping[str, Any]) -> bytes:
    """Something to know that is no event: readers of events pass it over, as they do pings."""
    return b": %b\n\n" % msgspec.json.encode(data)


async def with_pings(
    source: AsyncIterator[T], seconds: float = PING_SECONDS
) -> AsyncIterator[T | None]:
    """The items of `source`; None whenever nothing has come for `seconds`."""
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(source))
            await asyncio.wait({coming}, timeout=seconds)
            if not coming.done():
                yield None
                continue
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield item
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _until_error(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The status is sent: what goes wrong from now on is the last event."""
    try:
        async for item in frames:
            yield item
    except SglError as error:
        yield _error(envelope(status_of(error), str(error), error.code, error.param))
    except Exception:
        log.exception("an event stream failed")
        yield _error(envelope(500, INTERNAL, "internal_error"))


def _error(body: dict[str, Any]) -> bytes:
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()
