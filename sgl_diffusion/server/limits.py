"""The clock of request bodies: one that pauses or trickles is given up."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_diffusion.base.errors import RequestError

_GRACE_SECONDS = 60.0  # before the least rate counts
_LEAST_RATE = 1_000  # bytes a second


class BodyClock:
    """Ends the reading of a body that pauses for `pause` seconds, or comes too slowly on the
    whole. What a route waits for after the body, the end of the connection, has no clock."""

    def __init__(self, app: ASGIApp, pause: float) -> None:
        self.app = app
        self.pause = pause

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        received, reading = 0, True

        async def timed() -> Message:
            nonlocal received, reading
            if not reading:
                return await receive()
            try:
                async with asyncio.timeout(self.pause):
                    message = await receive()
            except TimeoutError:
                reading = False
                raise self._too_slow() from None
            received += len(message.get("body", b""))
            reading = message["type"] == "http.request" and message.get("more_body", False)
            elapsed = time.monotonic() - began
            if reading and elapsed > _GRACE_SECONDS and received < _LEAST_RATE * elapsed:
                reading = False
                raise self._too_slow()
            return message

        await self.app(scope, timed, send)

    def _too_slow(self) -> RequestError:
        return RequestError(
            f"The body paused for more than {self.pause:g} seconds, or came too slowly.",
            hint="The operator sets the pause with --body-timeout.",
            code="body_too_slow",
        )
