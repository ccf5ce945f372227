"""Reads numbers of files into tensors, with a change of their precision where it is wanted.

The native library does it with many threads, past the page cache where that is no help. Without it
one tensor is read after the other.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.base import native
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.loader.files import DAMAGED

log = get_logger(__name__)

_CHUNK = 16 << 20  # bytes that are read at a time
_CALL = 1 << 30  # bytes of one native call: in between, signals are heard
# What a disk needs to have in front of it, and what copies from the cache can use.
_THREADS = min(max(2 * (os.cpu_count() or 1), 8), 32)
# `Number` in csrc/include/sgld/convert.h; numbers that stay as they are go as bytes.
_BYTES = 0
_CACHED = -1  # in the place of a descriptor that passes by the page cache
_NUMBERS = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
STREAMED = (torch.float32, torch.bfloat16, torch.float16)  # what floats can become as they are read


@dataclass(frozen=True)
class Piece:
    """Numbers of a file from the byte `begin` on, and the dense tensor on the CPU they fill."""

    file: Path
    key: str
    begin: int
    dtype: torch.dtype
    target: Tensor

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.target.numel() * self.dtype.itemsize


def read_pieces(pieces: Sequence[Piece], *, again: bool = False) -> None:
    """Fill all targets; a file that ends too early or cannot be read is an error with its name.

    What will be read `again` goes through the page cache, so that it may be there the next time.
    """
    if reason := native.absent():
        _tell_once(reason)
        for piece in pieces:
            _read_alone(piece)
        return
    for call in _calls(pieces):
        _read_together(call, again)


@functools.cache
def _tell_once(reason: str) -> None:
    log.info("weights are read by one thread: %s", reason)


def _calls(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    call: list[Piece] = []
    size = 0
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.begin)):
        if call and size + piece.nbytes > _CALL:
            yield call
            call, size = [], 0
        call.append(piece)
        size += piece.nbytes
    if call:
        yield call


def _read_together(pieces: Sequence[Piece], again: bool) -> None:
    files = {piece.file: piece for piece in pieces}
    with ExitStack() as stack:
        buffered = [stack.enter_context(_opened(piece)) for piece in files.values()]
        direct = [
            _CACHED if again else stack.enter_context(_opened_directly(file)) for file in files
        ]
        place = {file: index for index, file in enumerate(files)}
        failure = torch.ops.sgld.read_weights(
            [piece.target for piece in pieces],
            buffered,
            direct,
            [place[piece.file] for piece in pieces],
            [piece.begin for piece in pieces],
            [
                _BYTES if piece.dtype == piece.target.dtype else _NUMBERS[piece.dtype]
                for piece in pieces
            ],
            _THREADS,
        )
    if failure:
        index, number = failure
        raise _unreadable(pieces[index], number) if number else _ended(pieces[index])


@contextmanager
def _opened(piece: Piece) -> Iterator[int]:
    try:
        file = FileIO(piece.file)
    except OSError as error:
        raise _unreadable(piece, error.errno or 0) from None
    with file:
        yield file.fileno()


@contextmanager
def _opened_directly(file: Path) -> Iterator[int]:
    """A descriptor that passes by the page cache, where the file system has such a thing."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        yield _CACHED
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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
