"""Reads tensors of safetensors files into memory that is there, without mapping the files.

Pages of a mapping count as memory of the process, and a mapped file that was cut short ends it;
what is read like this does neither. Any number of threads can read from one file.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.base.errors import EngineError
from sgl_diffusion.loader.files import DAMAGED, damaged

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MOST_HEADER = 100_000_000  # as safetensors itself has it


@dataclass(frozen=True)
class Range:
    """Where the numbers of one tensor are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class RangeFile:
    """One file, open as long as somebody has this object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise damaged(path) from None
        weakref.finalize(self, os.close, self._file)
        self._state = self._look()
        self.ranges = self._header()

    def read(self, key: str, into: Tensor) -> None:
        """Fill a contiguous tensor on the CPU with the numbers of `key`, converted to its dtype."""
        found = self.ranges[key]
        assert into.is_contiguous() and into.numel() * found.dtype.itemsize == found.nbytes
        if self._look() != self._state:
            raise EngineError(
                f"{self.path} has changed while its model is served.",
                hint="Start again; with offload, weights are read again and again.",
                code="weights_changed",
            )
        direct = into.dtype == found.dtype
        raw = into if direct else torch.empty(into.shape, dtype=found.dtype)
        self._fill(raw.view(-1).view(torch.uint8).numpy().data, found.start)
        if not direct:
            into.copy_(raw)

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], start + done)
            if count == 0:
                raise EngineError(f"{self.path} ends in the middle of a tensor.", hint=DAMAGED)
            done += count

    def _look(self) -> tuple[int, int]:
        state = os.fstat(self._file)
        return state.st_size, state.st_mtime_ns

    def _header(self) -> dict[str, Range]:
        size, _ = self._state
        try:
            (length,) = struct.unpack("<Q", os.pread(self._file, 8, 0))
            if length > min(size, _MOST_HEADER):
                raise damaged(self.path)
            header = json.loads(os.pread(self._file, length, 8))
            found = {
                key: _range(value, 8 + length)
                for key, value in header.items()
                if key != "__metadata__" and value["dtype"] in DTYPES
            }
        except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise damaged(self.path) from None
        if any(value.start + value.nbytes > size for value in found.values()):
            raise damaged(self.path)
        return found


def _range(value: dict[str, Any], base: int) -> Range:
    start, end = value["data_offsets"]
    shape, dtype = tuple(value["shape"]), DTYPES[value["dtype"]]
    if torch.Size(shape).numel() * dtype.itemsize != end - start or start < 0:
        raise ValueError("a tensor is not as long as its shape says")
    return Range(dtype, shape, base + start, end - start)
