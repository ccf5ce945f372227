"""Rules from the layer names that a file uses to the modules of diffusers, one table per family.

A layer of the original implementation may be several modules in diffusers: a fused qkv is to_q,
to_k and to_v, each a range of its rows. Names come dotted, or flat with underscores for dots.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.types import Delta, Dora, FullDelta, Hada, LowRank
from sgl_diffusion.loader.rules import Swap


@dataclass(frozen=True)
class Layer:
    """A layer by its name in files, with `{i}` for a number, and the modules that it is.

    `rows` are the shares of its rows that the modules have. A module `a:b` is the parameter b of
    module a itself.
    """

    source: str
    modules: tuple[str, ...]
    rows: tuple[int, ...] = (1,)
    swap: Swap = ""


@dataclass(frozen=True)
class Place:
    """A module, and which share of the file's rows it gets."""

    module: str
    parameter: str = ""
    share: tuple[int, int, int] = (0, 1, 1)  # from, to, of
    swap: Swap = ""


@dataclass(frozen=True)
class Family:
    """The table of one transformer class, and what its conventions are called.

    `own` holds the diffusers names that no `layers` lead to. `redundant` says that files may hold
    a fused layer and its parts side by side, which are the same change.
    """

    name: str
    layers: tuple[Layer, ...] = ()
    own: tuple[str, ...] = ()
    native: str = "native names"
    flat: str = "kohya"
    prefixes: Mapping[str, str] = field(default_factory=dict)
    redundant: bool = False

    def places(self, module: str, flat: bool) -> tuple[Place, ...]:
        """Where a layer goes; a dotted name that no rule knows is one of diffusers already, a flat
        one is nowhere."""
        for layer in _both(self) if flat else self.layers:
            if match := _pattern(layer.source, flat).fullmatch(module):
                return _places(layer, match.groupdict())
        return () if flat else (Place(module),)

    def is_native(self, module: str) -> bool:
        """Whether a dotted name is one that diffusers does not use."""
        return any(
            _pattern(layer.source, False).fullmatch(module)
            for layer in self.layers
            if layer.modules != (layer.source,)
        )


def generic(name: str, modules: Collection[str], layers: tuple[Layer, ...] = ()) -> Family:
    """A family without a table: flat names are those of the model's own modules."""
    own = {template(module) for module in modules}
    return Family(name, layers, own=tuple(sorted(own)))


def table(names: Mapping[str, str]) -> tuple[Layer, ...]:
    """Layers that are one module each."""
    return tuple(Layer(source, (module,)) for source, module in names.items())


@functools.lru_cache(maxsize=16)
def _flat_layers(layers: tuple[Layer, ...], own: tuple[str, ...]) -> tuple[Layer, ...]:
    modules = [module for layer in layers for module in layer.modules if ":" not in module]
    return (*layers, *(Layer(name, (name,)) for name in dict.fromkeys((*modules, *own))))


def _both(family: Family) -> tuple[Layer, ...]:
    """Layers by their own names and by those of diffusers."""
    return _flat_layers(family.layers, family.own)


def _places(layer: Layer, numbers: Mapping[str, str]) -> tuple[Place, ...]:
    places, first, whole = [], 0, sum(layer.rows)
    for module, rows in zip(layer.modules, layer.rows, strict=True):
        name, _, parameter = module.format(**numbers).partition(":")
        places.append(Place(name, parameter, (first, first + rows, whole), layer.swap))
        first += rows
    return tuple(places)


@functools.cache
def _pattern(template: str, flat: bool) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", template)
    text = "".join(
        rf"(?P<{part}>\d+)" if position % 2 else re.escape(part.replace(".", "_") if flat else part)
        for position, part in enumerate(parts)
    )
    return re.compile(text, re.ASCII)


def template(module: str) -> str:
    """The template of a module name; its numbers are kept apart, up to nine."""
    letters = iter("ijklmnopq")
    parts = ("{" + next(letters) + "}" if p.isdecimal() else p for p in module.split("."))
    return ".".join(parts)


def put(delta: Delta, place: Place, key: str) -> Delta:
    """The part of a layer's change that a module gets."""
    first, last, whole = place.share
    rows, rest = divmod(delta.shape[0], whole)
    if rest:
        raise RequestError(
            f"{key} has {delta.shape[0]} rows, which are not {whole} equal parts.",
            code="invalid_lora",
        )
    if place.swap == "halves" or (place.swap == "narrow" and _is_narrow(delta, key)):
        delta = _halves_swapped(delta, key)
    if place.parameter and isinstance(delta, FullDelta):
        return replace(delta, parameter=place.parameter)
    if (first, last) == (0, whole):
        return delta
    _no_columns(delta, key)
    return delta.rows(first * rows, last * rows)


def _is_narrow(delta: Delta, key: str) -> bool:
    if len(delta.shape) != 2:
        raise RequestError(f"{key}: a bias of this layer is not supported.", code="invalid_lora")
    return delta.shape[0] == 2 * delta.shape[1]


def _no_columns(delta: Delta, key: str) -> None:
    if isinstance(delta, Dora) and delta.by_column:
        raise RequestError(
            f"{key}: DoRA over the columns of a fused layer is not supported.",
            hint="Use a file whose dora_scale is per output row.",
            code="invalid_lora",
        )


def _halves_swapped(delta: Delta, key: str) -> Delta:
    half = delta.shape[0] // 2
    if isinstance(delta, LowRank):
        return replace(delta, up=delta.up.roll(half, 0))
    if isinstance(delta, FullDelta):
        return replace(delta, value=delta.value.roll(half, 0))
    if isinstance(delta, Hada):
        return replace(delta, w1_a=delta.w1_a.roll(half, 0), w2_a=delta.w2_a.roll(half, 0))
    if isinstance(delta, Dora):
        _no_columns(delta, key)
        change = _halves_swapped(delta.change, key)
        assert not isinstance(change, Dora), "a DoRA of a DoRA"
        return Dora(change, delta.magnitude.roll(half, 0))
    return FullDelta(delta.delta().roll(half, 0))
