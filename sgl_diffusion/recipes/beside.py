"""What a model's folder may hold beside its components: own defaults, and adapters for it.

`defaults.json` has fields of `SamplingDefaults`; every file of `adapters/` is an adapter whose
nickname is the file's name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.params import SamplingDefaults
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.loader.index import read_json

_DEFAULTS = "defaults.json"
_ADAPTERS = "adapters"


def own_defaults(folder: Path, defaults: SamplingDefaults) -> SamplingDefaults:
    """`defaults` with what the folder says instead."""
    path = folder / _DEFAULTS
    if not path.is_file():
        return defaults
    known = dataclasses.asdict(defaults)
    values = read_json(path)
    for name in values:
        if name not in known:
            raise SetupError(f"{path} names {name!r}.", hint=suggest(name, known))
    try:
        return msgspec.convert({**known, **values}, SamplingDefaults)
    except msgspec.ValidationError:
        raise SetupError(
            f"{path} has a value of another type than it should be.",
            hint="Sizes, frames and steps are whole numbers, scales are numbers.",
        ) from None


def own_adapters(folder: Path) -> tuple[str, ...]:
    """Paths of the adapters."""
    return tuple(str(path) for path in sorted((folder / _ADAPTERS).glob("*.safetensors")))
