"""Reads numbers of files into tensors, with a change of their precision where it is wanted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.files import DAMAGED

_CHUNK = 16 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class Piece:
    """Numbers of a file from the byte `begin` on, and the dense tensor on the CPU they fill."""

    file: Path
    key: str
    begin: int
    dtype: torch.dtype
    target: Tensor


def read_pieces(pieces: Sequence[Piece]) -> None:
    """Fill all targets; a file that ends too early or cannot be read is an error with its name."""
    for piece in pieces:
        _read_alone(piece)


def _read_alone(piece: Piece) -> None:
    flat = piece.target.view(-1)
    try:
        with FileIO(piece.file) as file:
            file.seek(piece.begin)
            for part in flat.split(_CHUNK // piece.dtype.itemsize):
                same = part.dtype == piece.dtype
                numbers = part if same else torch.empty(part.shape, dtype=piece.dtype)
                raw: Any = numbers.view(torch.uint8).numpy()
                if not _fill(file, memoryview(raw)):
                    raise _ended(piece)
                if not same:
                    part.copy_(numbers)
    except OSError as error:
        raise _unreadable(piece, error.errno or 0) from None


def _fill(file: FileIO, view: memoryview) -> bool:
    while view:
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def _ended(piece: Piece) -> SetupError:
    return SetupError(f"{piece.file} is damaged at {piece.key}: it ends too early.", hint=DAMAGED)


def _unreadable(piece: Piece, number: int) -> SetupError:
    return SetupError(
        f"{piece.file} cannot be read at {piece.key}: {os.strerror(number)}.",
        hint="Check the disk that it is on.",
    )
