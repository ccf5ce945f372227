"""Running an omni server: take the port, answer at once, load the model, drain at the end."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from pathlib import Path

from sgl_diffusion.apps.omni import omni_app
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.base.paths import data_folder
from sgl_diffusion.client.chat import ChatClient
from sgl_diffusion.client.types import Limits
from sgl_diffusion.server.context import Settings
from sgl_diffusion.server.lifetime import Run, access_of, http_server, say, url_of
from sgl_diffusion.server.omni.app import create_omni_app
from sgl_diffusion.server.omni.context import OmniContext
from sgl_diffusion.server.omni.settings import omni_settings
from sgl_diffusion.server.ports import bind


def serve(options: OmniServeOptions) -> int:
    """Serve until a signal comes; returns the exit code."""
    os.umask(0o077)  # whatever is written here, by the workers too, is nobody else's business
    parent = data_folder(options.data_dir) if options.data_dir else None
    with tempfile.TemporaryDirectory(prefix="sgl-omni-", dir=parent) as folder:
        settings = omni_settings(options, Path(folder))
        allowed = settings.keys.required or options.insecure_no_auth
        with bind(options.host, options.port, open_to_others=allowed) as listener:
            client = ChatClient(
                omni_app(options),
                max_queue=options.max_queue,
                log_level=options.log_level,
                limits=Limits(silence=options.worker_timeout),
            )
            return asyncio.run(_serve(options, settings, client, listener))


async def _serve(
    options: OmniServeOptions, settings: Settings, client: ChatClient, listener: socket.socket
) -> int:
    app = create_omni_app(client, settings, options)
    context: OmniContext = app.state.context
    server = http_server(app, settings, context.rejected)
    name = options.model_name or options.model_path
    say(f"{url_of(listener)}  model: {name}  {access_of(options.host, settings)}")

    def refuse() -> None:
        context.draining = True

    try:
        await Run(client, server, options.drain_timeout, refuse).until_stopped(listener)
    finally:
        await client.stop()
    return 0
