"""The check that a scheduler config asks for nothing this package computes differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_diffusion.base.errors import ConfigError

UNSUPPORTED = "unsupported_sampler"


def unsupported(message: str) -> ConfigError:
    return ConfigError(
        message,
        hint="Serve the model with --backend diffusers.",
        code=UNSUPPORTED,
        param="scheduler",
    )


def check_options(
    name: str,
    config: Mapping[str, Any],
    supported: Mapping[str, tuple[Any, ...]],
    defaults: Mapping[str, Any],
) -> None:
    """Raise unless each option has a supported value.

    An absent one has its default, or else the first supported value.
    """
    for option, values in supported.items():
        value = config.get(option, defaults.get(option, values[0]))
        if value not in values:
            known = " or ".join(repr(v) for v in values)
            raise unsupported(f"{name} with {option}={value!r} is not supported, only {known}.")
