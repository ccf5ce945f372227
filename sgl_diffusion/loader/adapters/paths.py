"""What a lora_path may be, and which ones a client may name. No torch: the server asks here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sgl_diffusion.base.errors import ConfigError, RequestError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::(?P<file>[\w./ -]+))?", re.ASCII)


def is_hub_id(path: str) -> bool:
    """Whether a text has the form `org/name` or `org/name:file.safetensors`."""
    return bool(_HUB_ID.fullmatch(path)) and ".." not in path and not path.endswith("/")


def split_hub_id(path: str) -> tuple[str, str | None]:
    """The repository, and the file of it that is meant."""
    repository, _, file = path.partition(":")
    return repository, file or None


def check_lora_path(
    path: str, *, trusted: bool, allowed: Sequence[Path] = (), param: str = "lora_path"
) -> bool:
    """Whether a path is one of this machine (or a hub id); an error if the client may not name it.

    `trusted` clients (of a server bound to loopback, or with the admin key) may name any path;
    others a hub id, or a path below a folder of --allowed-lora-path, links followed. The answer to
    them does not depend on which files exist elsewhere.
    """
    if trusted:
        return not is_hub_id(path) or is_on_disk(path)
    if is_hub_id(path):
        return False
    real = _real(path)
    if real is not None and any(real.is_relative_to(folder.resolve()) for folder in allowed):
        return True
    raise RequestError(
        "This server does not read adapters from that path.",
        hint="Use a hub id, the admin key, or a folder that --allowed-lora-path names.",
        code="lora_path_not_allowed",
        param=param,
    )


def check_there(paths: Sequence[str]) -> None:
    """An error that is cheap to find before a model is loaded: a path that is plainly one of this
    machine and leads nowhere. Other words may be names that the hub or the model knows."""
    for path in paths:
        plain = path.endswith(".safetensors") or path.startswith(("/", "./", "../", "~"))
        if plain and not is_hub_id(path) and not is_on_disk(path):
            raise ConfigError(
                f"There is no adapter {path}.", hint="Check --lora-path.", param="lora_path"
            )


def is_on_disk(path: str) -> bool:
    real = _real(path)
    return real is not None and real.exists()


def _real(path: str) -> Path | None:
    """The path with links followed; None where it cannot be one."""
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return None
