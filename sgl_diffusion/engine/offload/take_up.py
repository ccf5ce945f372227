"""Puts a model into use that was loaded without its weights: some come now, some when needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn

from sgl_diffusion.base.footprint import Offloaded
from sgl_diffusion.engine.offload.plan import DIT, TEXT, VAE
from sgl_diffusion.engine.offload.ring import Ring
from sgl_diffusion.engine.offload.tiers import Carrier, Copier, FromHost, Reader, from_checkpoint
from sgl_diffusion.engine.offload.units import Place, Split, Unit, split
from sgl_diffusion.engine.quantise import quantise, quantised_layers
from sgl_diffusion.loader.absent import Absences, AbsentModule

TRANSFORMER = "transformer"  # how the names of those begin

# By how the names of components begin: the option that keeps them away.
OPTIONS = {
    TRANSFORMER: DIT,
    "text_encoder": TEXT,
    "image_encoder": TEXT,
    "vae": VAE,
}


def option_of(component: str) -> str | None:
    """None for what has no weights, or none that could be away."""
    return next((OPTIONS[start] for start in OPTIONS if component.startswith(start)), None)


def take_up(
    absences: Absences,
    away: Collection[str],
    device: torch.device,
    *,
    pinned: bool,
    quantization: str = "none",
) -> tuple[Offloaded, ...]:
    """Bring the weights of all components but those in `away`, whose blocks come one by one."""
    found = []
    for absent in absences.modules:
        transformer = absent.name.startswith(TRANSFORMER)
        if absent.name in away:
            found.append(_offload(absent, device, pinned=pinned))
        elif transformer and quantization != "none":
            _bring_quantised(absent, device, quantization)
        else:
            _bring_all(absent, device)
    return tuple(found)


def described(absent: AbsentModule) -> Offloaded:
    """What its offload would do."""
    return _described(absent.name, split(absent))


def _described(name: str, parts: Split) -> Offloaded:
    return Offloaded(
        component=name, away=parts.away, resident=parts.resident, buffers=parts.buffers
    )


def _bring_all(absent: AbsentModule, device: torch.device) -> None:
    parts = split(absent)
    _fill_in(parts.rest, device)
    for ring in parts.rings:
        for unit in ring:
            _fill_in(unit.places, device)


def _bring_quantised(absent: AbsentModule, device: torch.device, name: str) -> None:
    parts = split(absent)
    places = [*parts.rest, *(p for ring in parts.rings for unit in ring for p in unit.places)]
    chosen: set[nn.Module] = {layer for _, layer in quantised_layers(absent.module)}
    weights = {p.owner: p for p in places if p.leaf == "weight" and p.owner in chosen}
    _fill_in([p for p in places if weights.get(p.owner) is not p], device)
    quantise(absent.module, weights, name)


def _offload(absent: AbsentModule, device: torch.device, *, pinned: bool) -> Offloaded:
    parts = split(absent)
    _fill_in(parts.rest, device)
    keep = absent.name.startswith(TRANSFORMER)
    carrier = _carrier(parts, device, pinned=pinned)
    for number, units in enumerate(parts.rings):
        ring = Ring(units, carrier, keep=keep)
        if number == 0:
            for module in _around(absent.module, units):
                ring.watch(module)
    return _described(absent.name, parts)


def _carrier(parts: Split, device: torch.device, *, pinned: bool) -> Carrier:
    if device.type == "cpu":
        return Reader(from_checkpoint)
    host = FromHost(pinned=pinned)
    for ring in parts.rings:
        for unit in ring:
            host.take(unit)
    return Copier(host, device)


def _around(module: nn.Module, units: Iterable[Unit]) -> Iterator[nn.Module]:
    """The modules that hold some of the units."""
    inside = {id(unit.module) for unit in units}
    for each in module.modules():
        held = any(id(inner) in inside for inner in each.modules())
        if held and id(each) not in inside and not isinstance(each, nn.ModuleList):
            yield each


def _fill_in(places: Iterable[Place], device: torch.device) -> None:
    """Read parameters; those that layers share stay shared."""
    made: dict[int, nn.Parameter] = {}
    for place in places:
        absent = place.parameter
        if id(absent) not in made:
            value = torch.empty(absent.shape, dtype=absent.dtype)
            place.home.read(value)
            made[id(absent)] = nn.Parameter(value.to(device), requires_grad=False)
        place.owner._parameters[place.leaf] = made[id(absent)]
