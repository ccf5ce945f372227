"""Parameters whose numbers stay in the checkpoint until they are needed.

A component that is loaded like this has its shapes, dtypes and device, and where each parameter is
read from (`Stored`). An absent parameter is not a number anywhere, so that what is computed with
one by mistake cannot be taken for a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.ranges import RangeFile


@dataclass(frozen=True)
class Piece:
    """A tensor of a file and the rows of a parameter that it fills, None for all of them; `swap`
    exchanges its halves."""

    file: RangeFile
    key: str
    rows: slice | None = None
    swap: bool = False

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.file.ranges[self.key].nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.file.ranges[self.key].dtype

    def read(self, into: Tensor) -> None:
        part = into if self.rows is None else into[self.rows]
        self.file.read(self.key, part)
        if self.swap:
            part.copy_(part.roll(len(part) // 2, 0))


@dataclass(frozen=True)
class Stored:
    """What a parameter consists of."""

    pieces: tuple[Piece, ...]

    def read(self, into: Tensor) -> None:
        """Fill a contiguous tensor on the CPU, in whatever dtype it has."""
        for piece in self.pieces:
            piece.read(into)


class AbsentParameter(nn.Parameter):
    """In the place of a parameter: its shape, its dtype, its device."""


def absent_parameter(
    shape: Iterable[int], dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    value = torch.full((), torch.nan, dtype=dtype, device=device).expand(tuple(shape))
    return AbsentParameter(value, requires_grad=False)


def is_absent(module: nn.Module) -> bool:
    """Whether any parameter of a module is not there now."""
    return any(isinstance(parameter, AbsentParameter) for parameter in module.parameters())


@dataclass(frozen=True)
class AbsentModule:
    """A component, and where each of its parameters is read from."""

    name: str
    module: nn.Module
    stored: Mapping[str, Stored]


@dataclass
class Absences:
    """The components of a model that were loaded without their numbers."""

    modules: list[AbsentModule] = field(default_factory=list)

    def add(self, name: str, module: nn.Module, stored: Mapping[str, Stored]) -> None:
        """Every parameter is to be absent already."""
        names = {name for name, _ in module.named_parameters()}
        assert names == set(stored), sorted(names ^ set(stored))
        self.modules.append(AbsentModule(name, module, stored))


class StoredPlaces:
    """Stand-ins for the tensors of a checkpoint, for a library that loads its own modules: they are
    indexed as safetensors' slices are, and known again by their memory."""

    def __init__(self, files: Iterable[Path], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._known: dict[int, Stored] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets the same memory
        self.state: dict[str, _Place] = {}
        for path in files:
            file = RangeFile(path)
            self.state.update({key: _Place(self, file, key) for key in file.ranges})

    def give(self, file: RangeFile, key: str) -> Tensor:
        value = torch.full((), torch.nan, dtype=self._dtype)
        self._kept.append(value)
        self._known[value.data_ptr()] = Stored((Piece(file, key),))
        return value.expand(file.ranges[key].shape)

    def put_down(self, module: nn.Module, device: torch.device) -> dict[str, Stored]:
        """Make the parameters of the loaded module absent ones; returns where they come from."""
        found: dict[str, Stored] = {}
        made: dict[int, nn.Parameter] = {}  # tied parameters stay one
        for owner_name, owner in module.named_modules():
            for leaf, parameter in list(owner._parameters.items()):
                if parameter is None:
                    continue
                name = f"{owner_name}.{leaf}".removeprefix(".")
                stored = self._known.get(parameter.data_ptr())
                if stored is None:
                    raise SetupError(
                        f"{type(module).__name__} cannot be offloaded: {name} is not in its files "
                        "as it is used.",
                        hint="Leave the offload of this component out.",
                        code="offload_not_supported",
                    )
                if parameter.data_ptr() not in made:
                    made[parameter.data_ptr()] = absent_parameter(
                        parameter.shape, parameter.dtype, device
                    )
                    found[name] = stored
                owner._parameters[leaf] = made[parameter.data_ptr()]
        return found


@dataclass(frozen=True)
class _Place:
    places: StoredPlaces
    file: RangeFile
    key: str

    def __getitem__(self, index: object) -> Tensor:
        return self.places.give(self.file, self.key)[index]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        return list(self.file.ranges[self.key].shape)
