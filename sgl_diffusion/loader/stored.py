"""Tensors of safetensors files that are read when they are asked for.

Libraries that load their own models take them in the place of a state dict: each tensor is mapped
alone, and is let go as soon as it was converted, so the peak is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# Pages that are read through a mapping count as memory of the process until it is closed.
_MAPPED_NUMBERS = 16 << 20


class StoredTensor:
    """One tensor of a file. Indexed as safetensors' own slices are, by `...` for all of it."""

    def __init__(self, file: Path, key: str, dtype: torch.dtype) -> None:
        """`dtype` is the one it will be wanted in."""
        self._file = file
        self._key = key
        self._dtype = dtype

    def __getitem__(self, index: object) -> Tensor:
        mapped = self._mapped()
        if mapped.dtype != self._dtype:  # whoever asks converts it, and that makes a copy
            return mapped[index]  # type: ignore[index]
        # A view of the file would change with the file.
        own = torch.empty_like(mapped)
        del mapped
        for start in range(0, own.numel(), _MAPPED_NUMBERS):
            part = slice(start, start + _MAPPED_NUMBERS)
            own.view(-1)[part] = self._mapped().view(-1)[part]
        return own[index]  # type: ignore[index]

    def _mapped(self) -> Tensor:
        with safe_open(self._file, framework="pt") as handle:
            value: Tensor = handle.get_tensor(self._key)
        return value


def stored_tensors(files: Iterable[Path], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Every tensor of some files by its key."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            found.update({key: StoredTensor(file, key, dtype) for key in handle.keys()})
    return found
