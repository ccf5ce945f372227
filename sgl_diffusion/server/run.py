"""Running the server: take the port, answer at once, load the model, drain at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from sgl_diffusion.apps.diffusion import diffusion_app
from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import OutOfMemoryError, SetupError, SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.client.client import Client
from sgl_diffusion.client.types import Limits
from sgl_diffusion.orchestrator.jobstore import JobStore
from sgl_diffusion.orchestrator.topology import App
from sgl_diffusion.server.app import create_app
from sgl_diffusion.server.background import IN_FLIGHT
from sgl_diffusion.server.connection import connection_class
from sgl_diffusion.server.context import ServerContext, Settings
from sgl_diffusion.server.middleware import is_loopback
from sgl_diffusion.server.ports import bind
from sgl_diffusion.server.settings import settings_of

log = get_logger(__name__)

_FINISH_SECONDS = 10.0  # for results that only have to be encoded and written
_LORA_STATE = "loras.json"  # in the data folder: the adapters in use
_CONNECTIONS_SECONDS = 5
_TINY_NOTE = (
    "No --model-path: serving a tiny random model. Its pictures are noise-like patterns, "
    "not images of the prompt."
)


def serve(options: ServeOptions, stages: App | None = None, limits: Limits | None = None) -> int:
    """Serve until a signal comes; returns the exit code. `stages` replaces those of the model."""
    os.umask(0o077)  # whatever is written here, by the workers too, is nobody else's business
    settings = settings_of(options)
    allowed = settings.keys.required or options.insecure_no_auth
    with bind(options.host, options.port, open_to_others=allowed) as listener:
        client = Client(
            stages or _diffusion(options),
            max_queue=options.max_queue + IN_FLIGHT,
            log_level=options.log_level,
            lora_timeout=options.lora_timeout,
            limits=limits or Limits(silence=options.worker_timeout),
        )
        return asyncio.run(_serve(options, settings, client, listener))


def _diffusion(options: ServeOptions) -> App:
    """The stages of a diffusion model; the adapters in use outlive its worker."""
    assert options.data_dir is not None, "the command line resolves the data folder"
    tempfile.tempdir = options.data_dir  # large uploads wait here without a name, not in memory
    lora_state = Path(options.data_dir) / _LORA_STATE
    if options.lora_path:  # what the command asks for wins over what was in use
        lora_state.unlink(missing_ok=True)
    return diffusion_app(options, lora_state=lora_state)


async def _serve(
    options: ServeOptions, settings: Settings, client: Client, listener: socket.socket
) -> int:
    jobs = await JobStore.open(settings.data_dir)
    try:
        app = create_app(client, jobs, settings)
        server = _Server(
            uvicorn.Config(
                app,
                http=connection_class(settings.limits, app.state.context.rejected),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.limits.keep_alive,
                timeout_graceful_shutdown=_CONNECTIONS_SECONDS,
            )
        )
        _say(f"{_url(listener)}  model: {_name(options)}  {_access(options, settings)}")
        if options.model_path is None:
            _say(_TINY_NOTE)
        run = _Run(client, server, app.state.context, options.drain_timeout)
        await run.until_stopped(listener)
    finally:
        await client.stop()
        await jobs.close()
    return 0


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the drain comes before its shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the lifespan open then, and its end is a traceback
            await self.lifespan.shutdown()


class _Run:
    """One run of the server: start, ready line, signals, drain."""

    def __init__(
        self, client: Client, server: _Server, context: ServerContext, drain_seconds: float
    ) -> None:
        self._client = client
        self._server = server
        self._context = context
        self._drain_seconds = drain_seconds
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
        _say(f"ready in {time.monotonic() - started:.1f} s")

    def _on_signal(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._stop_gently())
        else:
            self._server.force_exit = True
            self._server.should_exit = True

    async def _stop_gently(self) -> None:
        """New work is refused at once, while the port stays open and running jobs get time."""
        _say(f"stopping: running jobs get {self._drain_seconds:g} s, a second signal gives none")
        self._context.draining = True
        self._context.runner.stop_taking()
        await self._client.stop(self._drain_seconds)
        await self._context.runner.finish(_FINISH_SECONDS)
        self._server.should_exit = True


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _access(options: ServeOptions, settings: Settings) -> str:
    if settings.keys.required:
        return "key: required"
    return "key: none, this machine only" if is_loopback(options.host) else "key: NONE, OPEN TO ALL"


def _name(options: ServeOptions) -> str:
    return options.served_model_name or options.model_path or "tiny random Wan"


def _say(line: str) -> None:
    """For the person at the terminal; logs go to stderr. The server runs on if nobody reads."""
    try:
        print(line, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
