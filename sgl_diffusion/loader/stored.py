"""Tensors of safetensors files that are read when they are asked for.

Libraries that load their own models take them in the place of a state dict: each is read alone, and
is let go as soon as it was converted, so the peak is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.header import DTYPES, Stored, read_header
from sgl_diffusion.loader.reading import Piece, read_pieces


class StoredTensor:
    """One tensor of a file. Indexed as safetensors' own slices are, by `...` for all of it."""

    def __init__(self, file: Path, key: str, entry: Stored) -> None:
        if entry.dtype not in DTYPES:
            raise SetupError(f"{file} holds {key} as {entry.dtype}, which cannot be loaded.")
        self._file = file
        self._key = key
        self._entry = entry

    def __getitem__(self, index: object) -> Tensor:
        dtype = DTYPES[self._entry.dtype]
        value = torch.empty(self._entry.shape, dtype=dtype)
        read_pieces([Piece(self._file, self._key, self._entry.begin, dtype, value)])
        return value[index]  # type: ignore[index]


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some files by its key."""
    return {
        key: StoredTensor(file, key, entry)
        for file in files
        for key, entry in read_header(file).items()
    }
