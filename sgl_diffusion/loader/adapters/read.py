"""Reads an adapter: the tensors of a file, grouped by layer, under the names of diffusers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters import build, config, keys
from sgl_diffusion.loader.adapters.config import Config
from sgl_diffusion.loader.adapters.families.encoders import ENCODER
from sgl_diffusion.loader.adapters.files import read_file
from sgl_diffusion.loader.adapters.keys import Key, shown, some
from sgl_diffusion.loader.adapters.names import Family, put
from sgl_diffusion.loader.adapters.source import CONFIG, Source, locate
from sgl_diffusion.loader.adapters.types import (
    TRANSFORMER,
    TRANSFORMER_2,
    Adapter,
    Delta,
    FullDelta,
)

_MOST_CONFIG = 10_000_000
_PEFT = "base_model.model."
_AGAIN = "Export or download the adapter again."

_Name = tuple[str, str, bool]  # component, layer as the file has it, and whether that is flat


def read_adapter(
    path: str,
    family: Family,
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    experts: bool = False,
    alpha: float | None = None,
    local: bool | None = None,
    most_bytes: int | None = None,
    cache_dir: Path | None = None,
) -> Adapter:
    """The adapter that a path or hub id means, for a model of this family.

    `experts` says that the model has two transformers, so that a file may be meant for one of them;
    `alpha` replaces every alpha of the file; `local` is what `check_lora_path` answered. Larger
    files than `most_bytes` are refused before they are read.
    """
    source = locate(
        path,
        weight_name=weight_name,
        revision=revision,
        experts=experts,
        local=local,
        cache_dir=cache_dir,
    )
    if most_bytes is not None:
        source.check_size(most_bytes)
    return read_source(source, family, path=path, alpha=alpha)


def read_source(
    source: Source, family: Family, *, path: str = "", alpha: float | None = None
) -> Adapter:
    """The adapter in one file, or in one file for each of two experts."""
    parts = [_read_one(file, family, expert, alpha) for expert, file in source.files.items()]
    components: dict[str, dict[str, tuple[Delta, ...]]] = {}
    for part in parts:
        for component, modules in part.components.items():
            if component in components:
                raise _invalid(
                    f"The files {some([f.name for f in source.files.values()])} both change the "
                    f"{component}.",
                    "Load them as two adapters.",
                )
            components[component] = modules
    alphas = {value for part in parts for value in part.alphas}
    return Adapter(
        format=parts[0].format,
        path=path or str(next(iter(source.files.values()))),
        components=components,
        alpha=alphas.pop() if len(alphas) == 1 else None,
        unmatched=tuple(key for part in parts for key in part.unmatched),
    )


class _Reading:
    """One file on its way: the changes so far, and what was left over."""

    def __init__(self, family: Family, configs: Mapping[str, Config], alpha: float | None) -> None:
        self.format = ""
        self.components: dict[str, dict[str, tuple[Delta, ...]]] = {}
        self.alphas: set[float | None] = set()
        self.unmatched: list[str] = []
        self._family = family
        self._configs = configs
        self._alpha = alpha
        # Which layer of the file changes a parameter, and whether under another name.
        self._origins: dict[tuple[str, str, str], tuple[str, bool]] = {}

    def add(self, name: _Name, parts: Mapping[str, Tensor]) -> bool:
        """Add the changes of one layer; False if it is no layer, or one that is there already."""
        component, layer, flat = name
        places = _table(self._family, component).places(layer, flat)
        if not places:
            return False
        config = self._configs.get(component) or self._configs.get("") or Config()
        deltas, alpha = build.changes(layer, parts, config, self._alpha)
        alias = _is_alias(self._family, name)
        own = [(place.module, put(delta, place, layer)) for place in places for delta in deltas]
        for module, delta in own:
            other = self._origins.get((component, module, delta.parameter))
            if other is not None and self._family.redundant and alias and not other[1]:
                return False
            if other is not None:
                raise _invalid(
                    f"{shown(layer)} and {shown(other[0])} are the same layer, {module}.",
                    "An adapter changes each layer once; export it again.",
                )
        for module, delta in own:
            self._origins[component, module, delta.parameter] = (layer, alias)
            modules = self.components.setdefault(component, {})
            modules[module] = (*modules.get(module, ()), delta)
        if any(not isinstance(delta, FullDelta) for delta in deltas):
            self.alphas.add(alpha)
        return bool(own)


def _read_one(path: Path, family: Family, expert: str, alpha: float | None) -> _Reading:
    file = read_file(path)
    parsed = {key: keys.parse(key, family.prefixes) for key in file.tensors}
    known = {key: meaning for key, meaning in parsed.items() if meaning is not None}
    _refuse_several(known.values())
    reading = _Reading(family, _configs(path, file.metadata, known.values()), alpha)
    reading.format = _format(known.values(), family)
    reading.unmatched = [key for key in parsed if key not in known]
    layers: dict[_Name, dict[str, str]] = {}  # the keys of its parts
    for key, meaning in known.items():
        name = (meaning.component, meaning.layer, meaning.flat)
        other = layers.setdefault(name, {}).setdefault(meaning.part, key)
        if other != key:
            raise _invalid(f"{shown(key)} and {shown(other)} are the same.", _AGAIN)
    for name in sorted(layers, key=lambda name: _is_alias(family, name)):
        parts = {part: file.tensors[key] for part, key in layers[name].items()}
        if not reading.add(name, parts):
            reading.unmatched += layers[name].values()
    if not reading.components:
        raise _invalid(
            f"{shown(path.name)} names no layer of {family.name}: none of its {len(parsed)} keys "
            f"is known ({some(list(parsed), 3)}).",
            f"Check that the adapter was made for {family.name}.",
        )
    if expert:
        _give_to(expert, reading, path)
    return reading


def _give_to(expert: str, reading: _Reading, path: Path) -> None:
    """The changes of the transformer are meant for the expert that the file is named after."""
    if TRANSFORMER_2 in reading.components:
        raise _invalid(
            f"{shown(path.name)} is named after one expert, but holds both.",
            "Name the file without high or low noise.",
        )
    if TRANSFORMER in reading.components:
        reading.components[expert] = reading.components.pop(TRANSFORMER)


def _is_alias(family: Family, name: _Name) -> bool:
    """Whether the layer has another name in diffusers. Those come last: they may be redundant."""
    component, layer, flat = name
    places = _table(family, component).places(layer, flat)
    return len(places) != 1 or _undotted(places[0].module) != _undotted(layer)


def _undotted(name: str) -> str:
    return name.replace(".", "_")


def _table(family: Family, component: str) -> Family:
    return ENCODER if component.startswith("text_encoder") else family


def _configs(path: Path, metadata: Mapping[str, str], known: Iterable[Key]) -> Mapping[str, Config]:
    """The scale of each component: from the file's header, else from the file that PEFT writes
    beside it, which says nothing about files of others in the same folder."""
    found = config.read_header(metadata)
    beside = path.parent / CONFIG
    from_peft = path.stem == "adapter_model" or any(key.prefix.startswith(_PEFT) for key in known)
    if found or not from_peft or not beside.is_file():
        return found
    try:
        if beside.stat().st_size > _MOST_CONFIG:
            raise ValueError
        values = json.loads(beside.read_bytes())
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise _invalid(f"{CONFIG} beside the adapter is not a JSON object.", _AGAIN)
    return {"": config.read_config(values)}


def _refuse_several(known: Iterable[Key]) -> None:
    slots = sorted({key.slot for key in known if key.slot})
    if len(slots) > 1:
        raise _invalid(
            f"The file holds several adapters: {some(slots)}.", "Save each in a file of its own."
        )


def _format(known: Collection[Key], family: Family) -> str:
    """What the convention of a file is called, by its keys."""
    parts = {key.part.partition("_")[0] for key in known}
    kinds = {"hada": " LoHa", "lokr": " LoKr", "magnitude": " DoRA"}
    kind = next((kinds[part] for part in kinds if part in parts), "")
    transformer = [key for key in known if not key.component.startswith("text_encoder")]
    if any(".processor." in key.layer for key in transformer):
        return "XLabs" + kind
    if any(key.flat for key in known):
        return ("LyCORIS" if any(k.prefix == "lycoris_" for k in known) else family.flat) + kind
    if any(family.is_native(key.layer) for key in transformer):
        return family.native + kind
    if any(key.prefix.startswith(_PEFT) for key in known):
        return "PEFT" + kind
    if any(key.prefix.endswith("diffusion_model.") for key in known):
        return "ComfyUI" + kind
    return "diffusers" + kind


def _invalid(message: str, hint: str) -> RequestError:
    return RequestError(message, hint=hint, code="invalid_lora")
