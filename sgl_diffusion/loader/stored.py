"""Tensors of safetensors files that are read when they are asked for.

Libraries that load their own models take them in the place of a state dict: each is read alone,
straight into the precision that it is wanted in, so the peak is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.header import DTYPES, Stored, read_header
from sgl_diffusion.loader.reading import STREAMED, Piece, read_pieces


class StoredTensor:
    """One tensor of a file, for whoever asks as of safetensors' own slices: `[...]` for all of it,
    then `.to(dtype=...)`. Only then is it read, and in that precision: beside the tensor there is
    never the same one as the file has it."""

    def __init__(self, file: Path, key: str, entry: Stored) -> None:
        if entry.dtype not in DTYPES:
            raise SetupError(f"{file} holds {key} as {entry.dtype}, which cannot be loaded.")
        self._file = file
        self._key = key
        self._entry = entry

    def __getitem__(self, index: object) -> StoredTensor:
        assert index is Ellipsis, f"a stored tensor is read whole, not {index}"
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        stored = DTYPES[self._entry.dtype]
        # The reader changes the precision of floats; what else there is, is small.
        streamed = stored.is_floating_point and dtype in STREAMED
        value = torch.empty(self._entry.shape, dtype=dtype if streamed else stored)
        read_pieces([Piece(self._file, self._key, self._entry.begin, stored, value)])
        return value.to(device=device, dtype=dtype)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some files by its key."""
    return {
        key: StoredTensor(file, key, entry)
        for file in files
        for key, entry in read_header(file).items()
    }
