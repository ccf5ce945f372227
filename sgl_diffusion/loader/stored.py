"""Tensors of safetensors files that are read when they are asked for.

Libraries that load their own models take them in the place of a state dict: each is read alone,
straight into the precision that it is wanted in, so the peak is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.header import DTYPES, Stored, read_header
from sgl_diffusion.loader.mapped import map_tensor
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
        self._stored = DTYPES[entry.dtype]

    def __getitem__(self, index: object) -> StoredTensor:
        assert index is Ellipsis, f"a stored tensor is read whole, not {index}"
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self._entry.shape

    def read_as(self, wanted: torch.dtype | None) -> torch.dtype:
        """The dtype that it is read in: the reader changes the precision of floats; what else
        there is, is small."""
        streamed = self._stored.is_floating_point and wanted in STREAMED
        return wanted if streamed and wanted is not None else self._stored

    def piece(self, target: Tensor) -> Piece:
        """What fills `target`, which has its shape."""
        assert target.shape == self.shape
        return Piece(self._file, self._key, self._entry.begin, self._stored, target)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        read = self.read_as(dtype)
        value = None
        if read == self._stored:
            value = map_tensor(self._file, self._entry.begin, self.shape, read)
        if value is None:
            value = torch.empty(self.shape, dtype=read)
            read_pieces([self.piece(value)])
        return value.to(device=device, dtype=dtype)


class StackedTensor:
    """Several tensors of files as one, for whoever asks as of a `StoredTensor`: each of `rows` is
    joined along its first dimension, and the rows are stacked. Raises ValueError where they do not
    fit together."""

    def __init__(self, rows: Sequence[Sequence[StoredTensor]]) -> None:
        if len({tuple(part.shape for part in row) for row in rows}) != 1:
            raise ValueError("rows of different shapes")
        if len({part.shape[1:] for part in rows[0]}) != 1:
            raise ValueError("parts of different shapes")
        self._rows = rows

    def __getitem__(self, index: object) -> StackedTensor:
        assert index is Ellipsis, f"a stored tensor is read whole, not {index}"
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        first = self._rows[0]
        heights = [part.shape[0] for part in first]
        (read,) = {part.read_as(dtype) for row in self._rows for part in row}
        value = torch.empty((len(self._rows), sum(heights), *first[0].shape[1:]), dtype=read)
        pieces = []
        for whole, row in zip(value, self._rows, strict=True):
            targets = whole.split(heights)
            pieces += [part.piece(each) for part, each in zip(row, targets, strict=True)]
        read_pieces(pieces)
        return value.to(device=device, dtype=dtype)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some files by its key."""
    return {
        key: StoredTensor(file, key, entry)
        for file in files
        for key, entry in read_header(file).items()
    }
