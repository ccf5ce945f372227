"""What the counting of a pipeline depends on, as one word.

The pipeline is gone through as it is: classes, settings, shapes and precisions, whatever files or
options they came from. Only the numbers in tensors and the words of vocabularies are left out: that
a difference which does not matter costs one more counting is better than one overlooked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sgl_diffusion
from sgl_diffusion.base import env, native
from sgl_diffusion.engine.pipeline import Pipeline

_LIBRARIES = ("torch", "diffusers", "transformers")
_PLAIN = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device, Path)
_MANY = 4096  # words of a vocabulary and the like: their number is enough


def identity(pipeline: Pipeline) -> str:
    """The same for pipelines whose units of work take the same memory."""
    found = [_surroundings(), _Walk().of(pipeline)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _surroundings() -> list[Any]:
    root = Path(sgl_diffusion.__file__).parent
    # The library of kernels, and every module: they may change between two versions.
    files = [native.path(), *sorted(root.rglob("*.py"))]
    stamps = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in _stats(files)]
    return [
        sgl_diffusion.__version__,
        stamps,
        [version(name) for name in _LIBRARIES],
        platform.python_version(),
        [str(env.get(name)) for name in ("SGLD_OPS", "SGLD_CPU_ISA")],
        [platform.machine(), torch.backends.mkldnn.is_available()],
        str(torch.get_default_dtype()),
    ]


def _stats(files: list[Path]) -> list[tuple[Path, Any]]:
    return [(file, file.stat()) for file in files if file.exists()]


class _Walk:
    """Goes through an object and all it holds; what was seen before is told by its number."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []  # an object that is gone would leave its id to another

    def of(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return str(value)
        if id(value) in self._seen:
            return self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._held.append(value)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, Tensor):
            return [kind, list(value.shape), str(value.dtype), str(value.device), value.stride()]
        if isinstance(value, functools.partial):
            return [kind, self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) > _MANY:
            return [kind, len(value)]
        if isinstance(value, Mapping):
            return [kind, [[self.of(key), self.of(item)] for key, item in value.items()]]
        if isinstance(value, list | tuple):
            return [kind, [self.of(item) for item in value]]
        if isinstance(value, set | frozenset):
            return [kind, sorted(map(str, value))]
        if hasattr(value, "__qualname__"):
            return [kind, value.__module__, value.__qualname__, self.of(_bound(value))]
        return [kind, [[name, self.of(item)] for name, item in _attributes(value)]]


def _bound(function: Any) -> list[Any]:
    """What a class or a function takes along beside its code."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return [*cells, getattr(function, "__self__", None), getattr(function, "__defaults__", None)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Of an object, those in slots too."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    named = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *named]
