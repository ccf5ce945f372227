"""Which changes of an adapter meet which parameters of a model. Shapes only: no model is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sgl_diffusion.loader.adapters.types import Adapter, Delta, Dora, Modules

# The parameters of a component by their diffusers names, and their shapes.
Table = Mapping[str, tuple[int, ...]]

# Projections that diffusers can fuse: an adapter may have been made for the fused model.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True)
class Match:
    """The modules that get a change, under the names of the table, and what does not fit.

    `unmatched` are `component.module` names that the model lacks; `misfits` are layers that it has
    in another shape, in words.
    """

    matched: Mapping[str, Modules]
    unmatched: tuple[str, ...]
    misfits: tuple[str, ...]

    @property
    def layers(self) -> int:
        return sum(len(modules) for modules in self.matched.values())


def match(adapter: Adapter, tables: Mapping[str, Table]) -> Match:
    """Match an adapter against the components that it may change; others stay out of it.

    What the file holds for a component that has no table is unmatched, unless a table of the other
    expert takes it.
    """
    matched: dict[str, Modules] = {}
    unmatched: list[str] = []
    misfits: list[str] = []
    for component, table in tables.items():
        fits: dict[str, tuple[Delta, ...]] = {}
        for module, deltas in adapter.of(component).items():
            for name, delta in _resolved(table, module, deltas):
                key = _key(name, delta)
                if key not in table and f"{name}.weight" in table:
                    misfits.append(f"{component}.{name} has no {delta.parameter}")
                elif key not in table:
                    unmatched.append(f"{component}.{module}")
                elif not _same(delta, table[key]):
                    misfits.append(
                        f"{component}.{key} is {_size(table[key])} here and "
                        f"{_size(delta.shape)} there"
                    )
                else:
                    fits[name] = (*fits.get(name, ()), delta)
        if fits:
            matched[component] = fits
    used = {id(adapter.of(component)) for component in tables}
    for component, modules in adapter.components.items():
        if id(modules) not in used:
            unmatched += [f"{component}.{module}" for module in modules]
    return Match(matched, tuple(dict.fromkeys(unmatched)), tuple(misfits))


def _resolved(table: Table, module: str, deltas: tuple[Delta, ...]) -> list[tuple[str, Delta]]:
    """The changes of one module under the table's names: a fused one is split into its parts."""
    owner, _, leaf = module.rpartition(".")
    names = [f"{owner}.{part}".removeprefix(".") for part in _FUSED.get(leaf, ())]
    if names and _key(module, deltas[0]) not in table and f"{names[0]}.weight" in table:
        return _split(table, module, names, deltas)
    for name in _spellings(module):
        if any(_key(name, delta) in table for delta in deltas):
            return [(name, delta) for delta in deltas]
    return [(module, delta) for delta in deltas]


def _split(
    table: Table, module: str, names: list[str], deltas: tuple[Delta, ...]
) -> list[tuple[str, Delta]]:
    sizes = [table.get(f"{name}.weight", (0,))[0] for name in names]
    result: list[tuple[str, Delta]] = []
    for delta in deltas:
        if delta.shape[0] != sum(sizes) or (isinstance(delta, Dora) and delta.by_column):
            return [(module, delta) for delta in deltas]
        start = 0
        for name, size in zip(names, sizes, strict=True):
            result.append((name, delta.rows(start, start + size)))
            start += size
    return result


def _spellings(module: str) -> tuple[str, ...]:
    """CLIP has its layers with or without this prefix, by the release of transformers."""
    bare = module.removeprefix("text_model.")
    return (module, bare, f"text_model.{bare}")


def _key(module: str, delta: Delta) -> str:
    return f"{module}.{delta.parameter}".removeprefix(".")


def _same(delta: Delta, shape: tuple[int, ...]) -> bool:
    """Whether a change has the shape of a parameter, or of its weight as a matrix."""
    matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape
    return delta.shape in (shape, matrix)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
