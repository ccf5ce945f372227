"""A model's parameters from its config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from sgl_diffusion.base.errors import ConfigError, SetupError

P = TypeVar("P")


def read_params(
    kind: type[P],
    config: Mapping[str, Any],
    *,
    what: str,
    only: Mapping[str, Any] = MappingProxyType({}),
    indices: Collection[str] = (),
) -> P:
    """The dataclass `kind`: an absent value takes the default, an unknown one is ignored.

    `only` names values that change the computation, each with the one that is computed here. All
    numbers are sizes, above zero, but those named in `indices`.
    """
    for name, value in only.items():
        if config.get(name, value) != value:
            raise ConfigError(
                f"A {what} with {name}={config[name]!r} is not supported.",
                hint="Serve the model with --backend diffusers.",
                param=name,
            )
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    known = {name: config[name] for name in names if name in config}
    try:
        params = msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise _nonsense(f"{error}") from None
    for name, value in vars(params).items():
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]
        least = 0 if name in indices else 1e-30
        if any(not isinstance(v, bool | str) and v < least for v in numbers):
            raise _nonsense(f"{name}={value!r}")
    return params


def _nonsense(what: str) -> SetupError:
    """Not a ConfigError: those mean that the diffusers backend may know better."""
    return SetupError(
        f"The transformer's config.json is damaged: {what}.", hint="Download the model again."
    )
