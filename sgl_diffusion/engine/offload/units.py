"""What is brought together: the blocks of a module, and how their parameters lie in one buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sgl_diffusion.loader.absent import AbsentModule, Home

_SCRATCH = 32 << 20  # bytes of what is being converted
_ALIGNED = 64  # bytes, as torch's own tensors are: kernels round the same way


@dataclass(frozen=True)
class Place:
    """A parameter of a unit: its owner's name for it, and where it lies in the buffer."""

    owner: nn.Module
    leaf: str
    parameter: nn.Parameter  # the absent one
    home: Home
    start: int

    @property
    def nbytes(self) -> int:
        return self.parameter.nbytes

    def view(self, buffer: Tensor) -> Tensor:
        raw = buffer[self.start : self.start + self.nbytes]
        return raw.view(self.parameter.dtype).view(self.parameter.shape)


@dataclass(frozen=True, eq=False)
class Unit:
    """A module that is there as a whole while it computes, and away otherwise."""

    name: str
    module: nn.Module
    places: tuple[Place, ...]
    nbytes: int

    @property
    def converts(self) -> bool:
        """Whether numbers are read in another precision than they are used in."""
        return any(place.home.converts(place.parameter.dtype) for place in self.places)


@dataclass(frozen=True)
class Split:
    """A module taken apart: `rings` of units that share buffers, and the rest, which stays."""

    rings: tuple[tuple[Unit, ...], ...]
    rest: tuple[Place, ...]

    @property
    def away(self) -> int:
        return sum(unit.nbytes for ring in self.rings for unit in ring)

    @property
    def resident(self) -> int:
        return sum(place.nbytes for place in self.rest)

    @property
    def buffers(self) -> int:
        """Bytes that bringing takes: two of the largest unit of each ring."""
        converts = any(unit.converts for ring in self.rings for unit in ring)
        return sum(2 * largest(ring) for ring in self.rings) + (_SCRATCH if converts else 0)


def largest(ring: Sequence[Unit]) -> int:
    return max(unit.nbytes for unit in ring)


def split(absent: AbsentModule) -> Split:
    """The members of the outermost module lists are units. Layers that are also used beside the
    blocks they belong to (`BESIDE_BLOCKS` of a class) are units of another ring, but norms stay:
    they are small, and read without being called."""
    parameters = dict(absent.module.named_parameters())  # a tied one once
    layout = _Layout({id(parameters[name]): home for name, home in absent.homes.items()})
    beside = set(getattr(absent.module, "BESIDE_BLOCKS", ()))
    whole: list[Unit] = []
    others: list[Unit] = []
    for name, block in blocks(absent.module):
        for path, layer in block.named_modules():
            if path in beside and any(p.dim() > 1 for p in layer.parameters()):
                others.append(layout.unit(f"{name}.{path}", layer))
            elif path in beside:
                layout.leave(layer, absent.module)
        whole.append(layout.unit(name, block))
    rest = layout.places(absent.module)
    full = [[unit for unit in ring if unit.places] for ring in (whole, others)]
    return Split(tuple(tuple(ring) for ring in full if ring), rest)


def blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost module lists, by name."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{index}", block) for index, block in enumerate(child))
        else:
            yield from blocks(child, f"{path}.")


class _Layout:
    """Gives every parameter of a module to the first unit that asks for it."""

    def __init__(self, homes: Mapping[int, Home]) -> None:
        self._homes = homes  # by the identity of the absent parameter
        self._owners: dict[int, nn.Module] = {}  # of those given, the module that asked

    def unit(self, name: str, module: nn.Module) -> Unit:
        places = self.places(module)
        end = max((place.start + place.nbytes for place in places), default=0)
        return Unit(name, module, places, end)

    def leave(self, layer: nn.Module, module: nn.Module) -> None:
        """Give it to a module around it that will ask later."""
        self._owners.update({id(parameter): module for parameter in layer.parameters()})

    def places(self, module: nn.Module) -> tuple[Place, ...]:
        """One behind the other; a parameter that two layers share lies there once."""
        found: list[Place] = []
        starts: dict[int, int] = {}
        end = 0
        for owner in module.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is None or self._owners.setdefault(id(parameter), module) != module:
                    continue
                start = starts.setdefault(id(parameter), end)
                if start == end:
                    end += -(-parameter.nbytes // _ALIGNED) * _ALIGNED
                home = self._homes[id(parameter)]
                found.append(Place(owner, leaf, parameter, home, start))
        return tuple(found)
