"""The arguments of a forward pass: tensors inside of tuples and frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


def signature(value: Any) -> Hashable:
    """Equal for arguments with which a pass runs the same kernels: shapes and types of tensors, and
    everything else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if dataclasses.is_dataclass(value):
        return type(value), tuple(signature(part) for part in _parts(value))
    if isinstance(value, tuple | list):
        return tuple(signature(part) for part in value)
    assert isinstance(value, int | float | str | None), f"an argument of {type(value)}"
    return value


def tensors(value: Any) -> list[Tensor]:
    """All of them, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [x for part in _parts(value) for x in tensors(part)]
    if isinstance(value, tuple | list):
        return [x for part in value for x in tensors(part)]
    return []


def rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: rebuilt(getattr(value, name), change) for name in names}
        return dataclasses.replace(value, **parts)
    if isinstance(value, tuple | list):
        return type(value)(rebuilt(part, change) for part in value)
    return value


def _parts(value: Any) -> list[Any]:
    return [getattr(value, field.name) for field in dataclasses.fields(value)]
