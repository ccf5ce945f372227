"""Running the server: take the port, answer at once, load the model, drain at the end."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from pathlib import Path

from sgl_diffusion.apps.diffusion import diffusion_app
from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.client.client import Client
from sgl_diffusion.client.types import Limits
from sgl_diffusion.orchestrator.jobstore import JobStore
from sgl_diffusion.orchestrator.topology import App
from sgl_diffusion.recipes import demo
from sgl_diffusion.server.app import create_app
from sgl_diffusion.server.background import IN_FLIGHT
from sgl_diffusion.server.context import ServerContext, Settings
from sgl_diffusion.server.lifetime import Run, access_of, http_server, say, url_of
from sgl_diffusion.server.ports import bind
from sgl_diffusion.server.settings import settings_of

_FINISH_SECONDS = 10.0  # for results that only have to be encoded and written
_LORA_STATE = "loras.json"  # in the data folder: the adapters in use


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
    node = options.node_name or socket.gethostname()
    jobs = await JobStore.open(settings.data_dir, options.database_url, node)
    try:
        app = create_app(client, jobs, settings)
        context: ServerContext = app.state.context
        server = http_server(app, settings, context.rejected)
        access = access_of(options.host, settings)
        for line in _greeting(url_of(listener), options, access):
            say(line)

        def refuse() -> None:
            context.draining = True
            context.runner.stop_taking()

        async def finish() -> None:
            await context.runner.finish(_FINISH_SECONDS)

        def where() -> str:
            card = client.card()
            return "" if card is None else f" on {card.device}, in {card.dit_precision}"

        run = Run(client, server, options.drain_timeout, refuse, finish, where)
        await run.until_stopped(listener)
    finally:
        await client.stop()
        await jobs.close()
    return 0


def _greeting(url: str, options: ServeOptions, access: str) -> list[str]:
    """What an operator reads first: where it is, what it serves, and for a newcomer what to do."""
    name = options.served_model_name or options.model_path or demo.NAME
    lines = [f"{url}  model: {name}  {access}", f"playground: {url}/"]
    if options.model_path is None:
        lines += [f"no --model-path: {demo.NOTE}. Try:", _example(url)]
    return lines


def _example(url: str) -> str:
    """A line to paste into a shell, which leaves a picture."""
    body = '{"prompt": "a red circle on a blue background", "response_format": "b64_json"}'
    return (
        f"  curl -s {url}/v1/images/generations -H 'Content-Type: application/json' "
        f"-d '{body}' | python3 -c "
        '\'import base64, json, sys; open("circle.png", "wb").write('
        'base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\''
    )
