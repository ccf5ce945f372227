"""Tensors of a file that is in the page cache: its pages become the tensor, and nothing is copied.

Fresh memory costs more than what is written into it, and the pages are there already; processes
that load the same file share them. What is written to such a tensor, as a merged adapter is, stays
with the process. A file that is served is to be replaced, not written over: see docs/memory.md.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.base import env

_LEAST = 1 << 20  # bytes of a tensor: small ones are many, and quickly copied
_ALIGNED = 64  # as memory of torch's own is
_EVERY = 1 << 20  # bytes from one page that is looked up to the next


def map_tensor(file: Path, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """What the file holds from byte `begin` on; None where it is to be read: there is little of it,
    it is not in the cache, or a product of it might be rounded otherwise than of a copy."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < _LEAST or not _fits(begin, dtype) or not env.get("SGLD_MAP_WEIGHTS"):
        return None
    start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = begin + size - start
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size < begin + size:
                return None  # the reader says so
            pages = mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError):
        return None
    if not _in_cache(pages, length):
        return None
    flat = torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=begin - start)
    return flat.view(shape)


def _fits(begin: int, dtype: torch.dtype) -> bool:
    """Whether it lies as its numbers should. A product of one row in fp32 depends on more."""
    return begin % (_ALIGNED if dtype.itemsize > 2 else dtype.itemsize) == 0


def _in_cache(pages: mmap.mmap, length: int) -> bool:
    """Whether it is, looked up at a page of each megabyte: to ask for all takes longer than to use
    them. What is not there after all is read when it is used."""
    mincore = _mincore()
    if mincore is None:
        return False
    there = ctypes.c_ubyte()
    first = ctypes.c_char.from_buffer(pages)
    begin = ctypes.addressof(first)
    last = (length - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    return all(
        mincore(begin + place, mmap.PAGESIZE, ctypes.byref(there)) == 0 and there.value & 1
        for place in (*range(0, last, _EVERY), last)
    )


@functools.cache
def _mincore() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return call
