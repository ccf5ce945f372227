"""What an option is, and how the values of many come together.

`resolve` merges sources (later ones win) into a new object and keeps the origin of each value; an
unknown key is an error with a suggestion.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.registry import suggest

C = TypeVar("C")

_PASSWORD = re.compile(r"(?<=//)([^/:@\s]*):[^/@\s]*@")


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), least: float | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass(frozen=True)
class Resolved(typing.Generic[C]):
    """A configuration with the origin of each value: "default", "file ...", "flag"."""

    value: C
    origins: dict[str, str]

    def lines(self, *, origin: bool = True) -> list[str]:
        """One for each option; passwords in URLs are left out."""
        shown = []
        for name, source in self.origins.items():
            value = _PASSWORD.sub(r"\1:***@", repr(getattr(self.value, name)))
            shown.append(f"{name} = {value}" + (f"  ({source})" if origin else ""))
        return shown


def resolve(kind: type[C], sources: list[tuple[str, dict[str, Any]]]) -> Resolved[C]:
    """Merge `sources` of (origin, values) over the defaults of dataclass `kind`."""
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    origins = dict.fromkeys(known, "default")
    values: dict[str, Any] = {}
    for origin, given in sources:
        for key, value in given.items():
            name = key.replace("-", "_")
            if name not in known:
                flags = [n.replace("_", "-") for n in known]
                raise ConfigError(f"Unknown option {key!r} in {origin}.", hint=suggest(key, flags))
            where = f" in {origin}" if origin.startswith("file ") else ""
            values[name] = _coerce(name, where, value, hints[name], known[name].metadata)
            origins[name] = origin
    return Resolved(kind(**values), origins)


def _coerce(name: str, where: str, value: Any, kind: Any, rules: Mapping[str, Any]) -> Any:
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in allowed:
        return None
    target = next(t for t in allowed if t is not type(None))
    if typing.get_origin(target) is tuple:  # several values: a list, or one of them alone
        each = typing.get_args(target)[0]
        given = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(name, where, item, each, rules) for item in given)
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, target) or (target is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name} must be {target.__name__}, not {value!r}{where}.", param=name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is not a finite number{where}.", param=name)
    choices, least = rules["choices"], rules["least"]
    if choices and value not in choices:
        raise ConfigError(
            f"{name} is {value!r}{where}.", hint=f"Use one of: {', '.join(choices)}.", param=name
        )
    if least is not None and value < least:
        raise ConfigError(f"{name} is {value}{where}; it must be at least {least}.", param=name)
    return value
