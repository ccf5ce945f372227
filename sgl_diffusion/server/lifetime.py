"""One run of a server, whatever it serves: start, ready line, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from sgl_diffusion.base.errors import OutOfMemoryError, SetupError, SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.client.door import Door
from sgl_diffusion.server.connection import connection_class
from sgl_diffusion.server.context import Settings
from sgl_diffusion.server.middleware import is_loopback

log = get_logger(__name__)

_CONNECTIONS_SECONDS = 5


def http_server(app: FastAPI, settings: Settings, rejected: Counter[str]) -> Server:
    return Server(
        uvicorn.Config(
            app,
            http=connection_class(settings.limits, rejected),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.limits.keep_alive,
            timeout_graceful_shutdown=_CONNECTIONS_SECONDS,
        )
    )


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the drain comes before its shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the lifespan open then, and its end is a traceback
            await self.lifespan.shutdown()


class Run:
    """One run of the server: start, ready line, signals, drain."""

    def __init__(
        self,
        client: Door[Any],
        server: Server,
        drain_seconds: float,
        refuse: Callable[[], None],
        finish: Callable[[], Awaitable[None]] | None = None,
        where: Callable[[], str] = str,
    ) -> None:
        """`refuse` makes the app turn new work away; `finish` waits for what is left to do with
        results when the client has stopped; `where` is what to say when the model is ready."""
        self._client = client
        self._server = server
        self._drain_seconds = drain_seconds
        self._refuse = refuse
        self._finish = finish
        self._where = where
        self._drain: asyncio.Task[None] | None = None
        self._failure: SglError | None = None

    async def until_stopped(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        await self._client.start()
        ready = asyncio.create_task(self._announce())
        try:
            await self._server.serve(sockets=[listener])
        finally:
            for task in [ready, *([self._drain] if self._drain else [])]:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._failure is not None:
            raise self._failure
        if not self._server.started:
            raise SetupError("The server could not start.", hint="The lines above say why.")

    async def _announce(self) -> None:
        """Say when the model is ready. A wrong option or path ends the server, and so does a model
        that does not fit: waiting cannot help. Any other failure is retried by the supervision,
        and /readyz says so meanwhile."""
        started = time.monotonic()
        try:
            await self._client.ready()
        except (SetupError, OutOfMemoryError) as error:
            self._failure = error
            self._server.should_exit = True
            return
        except SglError as error:
            if self._drain is not None:
                return
            log.error("the model could not be loaded, trying again: %s", error)
            while not self._client.health().ready:
                await asyncio.sleep(0.5)
        say(f"ready in {time.monotonic() - started:.1f} s{self._where()}")

    def _on_signal(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._stop_gently())
        else:
            self._server.force_exit = True
            self._server.should_exit = True

    async def _stop_gently(self) -> None:
        """New work is refused at once, while the port stays open and running jobs get time."""
        say(f"stopping: running jobs get {self._drain_seconds:g} s, a second signal gives none")
        self._refuse()
        await self._client.stop(self._drain_seconds)
        if self._finish is not None:
            await self._finish()
        self._server.should_exit = True


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def access_of(host: str, settings: Settings) -> str:
    if settings.keys.required:
        return "key: required"
    return "key: none, this machine only" if is_loopback(host) else "key: NONE, OPEN TO ALL"


def say(line: str) -> None:
    """For the person at the terminal; logs go to stderr. The server runs on if nobody reads."""
    try:
        print(line, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
