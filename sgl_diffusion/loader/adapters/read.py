"""Reads an adapter: the tensors of a file, grouped by layer, under the names of diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters import build, config, keys
from sgl_diffusion.loader.adapters.config import Config
from sgl_diffusion.loader.adapters.families.encoders import ENCODER
from sgl_diffusion.loader.adapters.files import read_file
from sgl_diffusion.loader.adapters.keys import Key, shown, some
from sgl_diffusion.loader.adapters.names import Family, put
from sgl_diffusion.loader.adapters.source import Source, locate
from sgl_diffusion.loader.adapters.types import TRANSFORMER, Adapter, Delta, FullDelta

_MOST_CONFIG = 10_000_000

_Layers = dict[tuple[str, str, bool], dict[str, Tensor]]  # component, layer, flat -> part


def read_adapter(
    path: str,
    family: Family,
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    experts: bool = False,
    alpha: float | None = None,
    local: bool | None = None,
    cache_dir: Path | None = None,
) -> Adapter:
    """The adapter that a path or hub id means, for a model of this family.

    `experts` says that the model has two transformers, so that a file may be meant for one of them;
    `alpha` replaces every alpha of the file; `local` is what `check_lora_path` answered.
    """
    source = locate(
        path,
        weight_name=weight_name,
        revision=revision,
        experts=experts,
        local=local,
        cache_dir=cache_dir,
    )
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


@dataclass
class _Part:
    """What one file holds."""

    format: str = ""
    components: dict[str, dict[str, tuple[Delta, ...]]] = field(default_factory=dict)
    alphas: set[float | None] = field(default_factory=set)
    unmatched: list[str] = field(default_factory=list)


def _read_one(path: Path, family: Family, expert: str, alpha: float | None) -> _Part:
    file = read_file(path)
    parsed = {key: keys.parse(key, family.prefixes) for key in file.tensors}
    _refuse_several(parsed.values())
    part = _Part(format=_format(parsed, family))
    part.unmatched = [key for key, meaning in parsed.items() if meaning is None]
    configs = _configs(path, file.metadata)
    layers: _Layers = {}
    origins: dict[tuple[str, str, bool], list[str]] = {}
    for key, meaning in parsed.items():
        if meaning is not None:
            name = (meaning.component, meaning.layer, meaning.flat)
            group = layers.setdefault(name, {})
            if meaning.part in group:
                raise _invalid(f"{shown(key)} is in the file twice, under two names.", _AGAIN)
            group[meaning.part] = file.tensors[key]
            origins.setdefault(name, []).append(key)
    placed: dict[tuple[str, str, str], tuple[str, bool]] = {}
    for name in sorted(layers, key=lambda name: _is_alias(family, name)):
        if not _place(part, family, name, layers[name], configs, alpha, placed):
            part.unmatched += origins[name]
    if not part.components:
        raise _invalid(
            f"{shown(path.name)} names no layer of {family.name}: none of its {len(parsed)} keys "
            f"is known ({some(list(parsed), 3)}).",
            f"Check that the adapter was made for {family.name}.",
        )
    if expert:
        if set(part.components) & {"transformer_2"}:
            raise _invalid(
                f"{shown(path.name)} is named after one expert, but holds both.",
                "Name the file without high or low noise.",
            )
        if TRANSFORMER in part.components:
            part.components[expert] = part.components.pop(TRANSFORMER)
    return part


def _place(
    part: _Part,
    family: Family,
    name: tuple[str, str, bool],
    tensors: Mapping[str, Tensor],
    configs: Mapping[str, Config],
    alpha: float | None,
    placed: dict[tuple[str, str, str], tuple[str, bool]],
) -> bool:
    """Add the changes of one layer to their modules; False if it is none or already there."""
    component, layer, flat = name
    places = _table(family, component).places(layer, flat)
    settings = configs.get(component) or configs.get("") or Config()
    deltas, used = build.changes(layer, tensors, settings, alpha) if places else ([], None)
    if not deltas:
        return False
    own = [(place.module, put(delta, place, layer)) for place in places for delta in deltas]
    alias = _is_alias(family, name)
    for module, delta in own:
        other = placed.get((component, module, delta.parameter))
        if other is not None and family.redundant and alias and not other[1]:
            return False
        if other is not None:
            raise _invalid(
                f"{shown(layer)} and {shown(other[0])} are the same layer, {module}.",
                "An adapter changes each layer once; export it again.",
            )
    modules = part.components.setdefault(component, {})
    for module, delta in own:
        placed[component, module, delta.parameter] = (layer, alias)
        modules[module] = (*modules.get(module, ()), delta)
    if any(not isinstance(delta, FullDelta) for delta in deltas):
        part.alphas.add(used)
    return True


def _is_alias(family: Family, name: tuple[str, str, bool]) -> bool:
    """Whether the layer has another name in diffusers. Those come last: they may be redundant."""
    component, layer, flat = name
    places = _table(family, component).places(layer, flat)
    return len(places) != 1 or _undotted(places[0].module) != _undotted(layer)


def _undotted(name: str) -> str:
    return name.replace(".", "_")


def _table(family: Family, component: str) -> Family:
    return ENCODER if component.startswith("text_encoder") else family


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, Config]:
    """The scale of each component: from the file's header, else from PEFT's file beside it."""
    found = config.read_header(metadata)
    beside = path.parent / "adapter_config.json"
    if found or not beside.is_file():
        return found
    try:
        if beside.stat().st_size > _MOST_CONFIG:
            raise ValueError
        values = json.loads(beside.read_bytes())
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise _invalid("adapter_config.json beside the adapter is not a JSON object.", _AGAIN)
    return {"": config.read_config(values)}


def _refuse_several(parsed: Iterable[Key | None]) -> None:
    slots = sorted({key.slot for key in parsed if key is not None and key.slot})
    if len(slots) > 1:
        raise _invalid(
            f"The file holds several adapters: {some(slots)}.", "Save each in a file of its own."
        )


def _format(parsed: Mapping[str, Key | None], family: Family) -> str:
    """What the convention of a file is called, by its keys."""
    known = [key for key in parsed.values() if key is not None]
    parts = {key.part for key in known}
    kind = next((k for p, k in (("hada", " LoHa"), ("lokr", " LoKr")) if _any(parts, p)), "")
    kind = kind or (" DoRA" if "magnitude" in parts else "")
    transformer = [key for key in known if not key.component.startswith("text_encoder")]
    if any(".processor." in key.layer for key in transformer):
        return "XLabs" + kind
    if any(key.flat for key in known):
        return ("LyCORIS" if any(k.prefix == "lycoris_" for k in known) else family.flat) + kind
    if any(family.is_native(key.layer) for key in transformer):
        return family.native + kind
    if any(key.prefix.startswith("base_model.model.") for key in known):
        return "PEFT" + kind
    if any(key.prefix.endswith("diffusion_model.") for key in known):
        return "ComfyUI" + kind
    return "diffusers" + kind


def _any(parts: set[str], start: str) -> bool:
    return any(part.startswith(start) for part in parts)


_AGAIN = "Export or download the adapter again."


def _invalid(message: str, hint: str) -> RequestError:
    return RequestError(message, hint=hint, code="invalid_lora")
