"""Parameters whose numbers stay in the checkpoint until they are needed.

A component that is loaded like this has its shapes, dtypes and device, and where each parameter is
read from (`Home`). An absent parameter is not a number anywhere, so that what is computed with one
by mistake cannot be taken for a result.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sgl_diffusion.base.errors import EngineError, SetupError
from sgl_diffusion.loader.copies import Copy, plan_copies, to_fill
from sgl_diffusion.loader.files import weight_files
from sgl_diffusion.loader.header import DTYPES, read_header
from sgl_diffusion.loader.index import Component
from sgl_diffusion.loader.reading import read_pieces
from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.loader.weights import load_weights, pieces_of, precisions


@dataclass(frozen=True)
class Snapshot:
    """A file as it was when its header was read."""

    path: Path
    state: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        return cls(path, _look(path))

    def check(self) -> None:
        """Numbers of another file, or of another state of this one, are none of the model."""
        try:
            same = _look(self.path) == self.state
        except OSError:
            same = False
        if not same:
            raise EngineError(
                f"{self.path} has changed while its model is served.",
                hint="Start again; what is offloaded is read again and again.",
                code="weights_changed",
            )


def _look(path: Path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Home:
    """Where the numbers of one parameter are."""

    copies: tuple[Copy, ...]
    files: tuple[Snapshot, ...]

    def read(self, into: Tensor) -> None:
        """Fill a dense tensor on the CPU, in whatever dtype it has."""
        for file in self.files:
            file.check()
        read_pieces([piece for copy in self.copies for piece in pieces_of(copy, into)], again=True)

    def converts(self, dtype: torch.dtype) -> bool:
        """Whether reading takes a change of the precision."""
        return any(copy.dtype != dtype for copy in self.copies)


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
    homes: Mapping[str, Home]


@dataclass
class Absences:
    """The components of a model that were loaded without their numbers."""

    modules: list[AbsentModule] = field(default_factory=list)

    def add(self, name: str, module: nn.Module, homes: Mapping[str, Home]) -> None:
        """Every parameter is to be absent already."""
        names = {name for name, _ in module.named_parameters()}
        assert names == set(homes), sorted(names ^ set(homes))
        self.modules.append(AbsentModule(name, module, homes))


def load_or_leave(
    module: nn.Module, part: Component, rules: Rules, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a module that was built under `torch.device("meta")`, or make its parameters absent."""
    source, variant = part.weights, part.variant
    if part.absences is None:
        load_weights(module, source, rules, dtype=dtype, device=device, variant=variant)
    else:
        homes = leave_weights(module, source, rules, dtype=dtype, device=device, variant=variant)
        part.absences.add(part.folder.name, module, homes)


def leave_weights(
    module: nn.Module,
    source: Path,
    rules: Rules | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
) -> dict[str, Home]:
    """As `load_weights`, but parameters become absent ones; returns where they are. Buffers that
    the files hold are small and filled now."""
    files = [source] if source.is_file() else weight_files(source, variant)
    snapshots = {file: Snapshot.of(file) for file in files}
    copies: dict[str, tuple[Copy, ...]] = {}
    for copy in plan_copies(module, files, rules or Rules(), source):
        copies[copy.name] = (*copies.get(copy.name, ()), copy)
    homes = {}
    wanted = precisions(module, dtype)
    for name, old in to_fill(module).items():
        used = dict.fromkeys(copy.file for copy in copies[name])
        home = Home(copies[name], tuple(snapshots[file] for file in used))
        owner, _, leaf = name.rpartition(".")
        if isinstance(old, nn.Parameter):
            homes[name] = home
            setattr(
                module.get_submodule(owner), leaf, absent_parameter(old.shape, wanted[name], device)
            )
        else:
            value = torch.empty(old.shape, dtype=wanted[name])
            home.read(value)
            setattr(module.get_submodule(owner), leaf, value.to(device))
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer has no value"
    module.eval()
    return homes


class Places:
    """Stand-ins for the tensors of a checkpoint, for a library that loads its own modules: they are
    indexed as safetensors' slices are, and known again by their memory."""

    def __init__(self, files: Iterable[Path], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._given: dict[int, tuple[Tensor, Home]] = {}  # kept, so that no other takes its memory
        self.state: dict[str, _Place] = {}
        for file in files:
            snapshot = Snapshot.of(file)
            for key, entry in read_header(file).items():
                copy = Copy(file, key, entry.begin, DTYPES[entry.dtype], key, None, False)
                self.state[key] = _Place(self, entry.shape, Home((copy,), (snapshot,)))

    def give(self, shape: tuple[int, ...], home: Home) -> Tensor:
        value = torch.full((), torch.nan, dtype=self._dtype)
        self._given[value.data_ptr()] = value, home
        return value.expand(shape)

    def put_down(self, module: nn.Module, device: torch.device) -> dict[str, Home]:
        """Make the parameters of the loaded module absent ones; returns where they are."""
        homes: dict[str, Home] = {}
        made: dict[int, nn.Parameter] = {}  # what layers share stays shared
        for path, owner in module.named_modules():
            for leaf, old in list(owner._parameters.items()):
                if old is None:
                    continue
                name, memory = f"{path}.{leaf}".removeprefix("."), old.data_ptr()
                if memory not in self._given:
                    raise SetupError(
                        f"{type(module).__name__} cannot be offloaded: {name} is not in its files "
                        "as it is used.",
                        hint="Leave the offload of this component out.",
                        code="offload_not_supported",
                    )
                if memory not in made:
                    made[memory] = absent_parameter(old.shape, old.dtype, device)
                    homes[name] = self._given[memory][1]
                owner._parameters[leaf] = made[memory]
        return homes


@dataclass(frozen=True)
class _Place:
    places: Places
    shape: tuple[int, ...]
    home: Home

    def __getitem__(self, index: object) -> Tensor:
        return self.places.give(self.shape, self.home)[index]  # type: ignore[index]
