"""The port, and the way to the hub."""

from __future__ import annotations

import urllib.error
import urllib.request

from sgl_diffusion.base import env
from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.cli.checks.types import Check, ok, refused, warning

_SECONDS = 5.0
_HUB = "https://huggingface.co"


def port(options: ServeOptions | OmniServeOptions, *, keys: bool) -> Check:
    """Whether the server can have it; `keys`: callers have to show one."""
    from sgl_diffusion.server.ports import bind

    allowed = keys or options.insecure_no_auth
    try:
        bind(options.host, options.port, open_to_others=allowed).close()
    except SetupError as error:
        return refused("port", error, "Name another with --host and --port.")
    return ok("port", f"{options.host}:{options.port} is free")


def hub() -> Check:
    """One question to the hub; nothing is sent with it."""
    url = env.get("HF_ENDPOINT") or _HUB
    token = "with a token" if env.get("HF_TOKEN") else "without a token"
    if env.get("HF_HUB_OFFLINE"):
        return ok("hub", "not asked, as HF_HUB_OFFLINE is set")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError):
        fix = "Check the connection and HF_ENDPOINT; folders and downloaded models work without it."
        return warning("hub", f"{url} cannot be reached", fix)
    return ok("hub", f"{url} answers, {token}")
