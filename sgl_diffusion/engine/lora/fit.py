"""Where the changes of an adapter go in a pipeline, checked before any of them is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import LoraFile, LoraUse
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.loader.adapters.files import is_finite
from sgl_diffusion.loader.adapters.match import match
from sgl_diffusion.loader.adapters.table import table_of
from sgl_diffusion.loader.adapters.types import Adapter, Delta, Dora

D = TypeVar("D", bound=Delta)

_NAMED = 5  # names that an error lists


@dataclass(frozen=True)
class Source:
    """Which file a nickname stands for. `alpha` replaces the file's own."""

    nickname: str
    path: str
    alpha: float | None = None
    weight_name: str | None = None
    local: bool | None = None
    revision: str | None = None

    @classmethod
    def of(cls, file: LoraFile) -> Source:
        """The source that is meant by one with a path."""
        assert file.path is not None
        more = (file.alpha, file.weight_name, file.local, file.revision)
        return cls(file.nickname, file.path, *more)

    def adjusted(self, file: LoraFile) -> Source:
        """The same with what is said of it beside its path."""
        said: dict[str, Any] = {
            "alpha": file.alpha,
            "weight_name": file.weight_name,
            "revision": file.revision,
        }
        return dataclasses.replace(self, **{k: v for k, v in said.items() if v is not None})

    def accepted(self, strength: float) -> LoraUse:
        """What a job has that was accepted with it."""
        return LoraUse(**dataclasses.asdict(self), strength=strength, accepted=True)


@dataclass(frozen=True, eq=False)
class Place:
    """Where one change goes: the rows from `start` of a parameter of one of our modules."""

    module: nn.Module
    name: str
    delta: Delta
    start: int

    @property
    def parameter(self) -> Tensor:
        parameter = getattr(self.module, self.delta.parameter)
        assert isinstance(parameter, Tensor)
        return parameter.detach()

    @property
    def can_be_applied(self) -> bool:
        """To single rows of a batch; what cannot is merged."""
        return self.delta.per_request and isinstance(self.module, nn.Linear)


@dataclass(frozen=True, eq=False)
class Fitted:
    """An adapter on its places, by component. `unmatched` are the names that have none."""

    source: Source
    adapter: Adapter
    places: Mapping[str, tuple[Place, ...]]
    unmatched: tuple[str, ...]
    nbytes: int

    @property
    def layers(self) -> int:
        return sum(len({place.name for place in places}) for places in self.places.values())

    def not_applicable(self) -> list[str]:
        """Modules that keep the adapter from being applied row by row."""
        return [
            f"{place.name} ({place.delta.kind})"
            for places in self.places.values()
            for place in places
            if not place.can_be_applied
        ]


def fit(source: Source, adapter: Adapter, components: Mapping[str, Adaptable]) -> Fitted:
    """The adapter on the devices of the components; RequestError where it does not fit."""
    tables = {name: table_of(each.module, each.rules) for name, each in components.items()}
    found = match(adapter, tables)
    if found.misfits:
        raise _misfit(source, listing(found.misfits))
    unmatched = [*adapter.unmatched, *found.unmatched]
    places = {
        component: tuple(
            _place(source, component, name, components[component], delta)
            for name, deltas in modules.items()
            for delta in deltas
        )
        for component, modules in found.matched.items()
    }
    if not places:
        raise RequestError(
            f"The adapter {source.nickname!r} changes no layer of this model.",
            hint=f"It names {listing(unmatched)}." if unmatched else "",
            code="invalid_lora",
            param="lora_path",
        )
    nbytes = _bytes(place.delta for found in places.values() for place in found)
    return Fitted(source, adapter, places, tuple(unmatched), nbytes)


def listing(names: Iterable[str]) -> str:
    """The first few of many names, for an error."""
    every = list(names)
    rest = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + rest


def _bytes(deltas: Iterable[Delta]) -> int:
    storages = (tensor.untyped_storage() for delta in deltas for tensor in delta.tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _place(source: Source, component: str, name: str, adaptable: Adaptable, delta: Delta) -> Place:
    target = adaptable.rules.target(name)
    assert target is not None, f"the table has {name}, which the rules leave out"
    module = adaptable.module.get_submodule(target.module)
    segments = getattr(module, "segments", {"": slice(0, None)})
    parameter = getattr(module, delta.parameter)
    if not all(map(is_finite, delta.tensors)):
        raise _misfit(source, f"{component}.{name} holds numbers that are not finite")
    moved = _moved(delta, parameter.device)
    return Place(module, f"{component}.{name}", moved, segments[target.segment].start)


def _misfit(source: Source, why: str) -> RequestError:
    return RequestError(
        f"The adapter {source.nickname!r} does not fit this model: {why}.",
        hint="It was made for another model or size.",
        code="invalid_lora",
        param="lora_path",
    )


def _moved(delta: D, device: torch.device) -> D:
    """The change with its tensors on a device."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(delta):
        value = getattr(delta, field.name)
        if isinstance(value, Tensor):
            values[field.name] = value.to(device)
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            values[field.name] = tuple(tensor.to(device) for tensor in value)
        elif isinstance(delta, Dora) and field.name == "change":
            values[field.name] = _moved(value, device)
    return dataclasses.replace(delta, **values)
