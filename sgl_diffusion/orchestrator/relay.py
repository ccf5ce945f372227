"""Arrays between processes: one sealed memfd per output, mapped read-only where it arrives.

The seals matter to the receiver: a sender that shrank the file under a mapping would kill the
reader with SIGBUS, and one that wrote to it would change a finished result.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.orchestrator.frames import ChannelError
from sgl_diffusion.orchestrator.messages import ArraySpec

_ALIGN = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_KINDS = "biufc"
_FEW = 1 << 16


def describe(arrays: Sequence[NDArray[Any]]) -> list[ArraySpec]:
    """Where each array goes; only plain numbers travel."""
    specs, end = [], 0
    for values in arrays:
        assert values.dtype.kind in _KINDS, f"arrays of {values.dtype} do not travel"
        specs.append(ArraySpec(dtype=values.dtype.str, shape=values.shape, offset=end))
        end = -(-(end + values.nbytes) // _ALIGN) * _ALIGN
    return specs


def pack(arrays: Sequence[NDArray[Any]], specs: Sequence[ArraySpec]) -> int | None:
    """Copy the arrays into a new sealed memfd; None if there are no bytes. The caller closes it."""
    size = max(
        (spec.offset + values.nbytes for values, spec in zip(arrays, specs, strict=True)), default=0
    )
    if not size:
        return None
    descriptor = os.memfd_create("sgl-diffusion", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        for values, spec in zip(arrays, specs, strict=True):
            _write(descriptor, values, spec.offset)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def inside(arrays: Sequence[NDArray[Any]], specs: Sequence[ArraySpec]) -> bytes:
    """The arrays as bytes of the message itself, laid out as in shared memory; empty if they are
    too many bytes for that."""
    ends = [spec.offset + values.nbytes for values, spec in zip(arrays, specs, strict=True)]
    size = max(ends, default=0)
    if size > _FEW:
        return b""
    data = bytearray(size)
    for values, spec, end in zip(arrays, specs, ends, strict=True):
        data[spec.offset : end] = values.tobytes()
    return bytes(data)


def _write(descriptor: int, values: NDArray[Any], offset: int) -> None:
    # By write and not through a mapping: no page faults, and a lack of memory is an error and not
    # a SIGBUS. What is not contiguous goes one frame at a time, so that it is not copied whole.
    for part in [values] if values.flags.c_contiguous else values:
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written


def unpack(
    specs: Sequence[ArraySpec], descriptor: int | None, data: bytes = b""
) -> list[NDArray[Any]]:
    """The arrays of a received memfd, or of `data`; read-only, the memory goes with the last.

    Closes the descriptor (the mapping keeps a duplicate of its own for as long as it lives).
    """
    try:
        memory: mmap.mmap | bytes = data
        if descriptor is not None:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ChannelError("shared memory that is not sealed")
            memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        for spec in specs:
            _check(spec, len(memory))
        return [_view(memory, spec) for spec in specs]
    except (OSError, TypeError, ValueError) as error:
        raise ChannelError(f"shared memory that cannot be mapped: {error}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _check(spec: ArraySpec, size: int) -> None:
    dtype = np.dtype(spec.dtype)
    end = spec.offset + math.prod(spec.shape) * dtype.itemsize
    if dtype.kind not in _KINDS or min((spec.offset, *spec.shape)) < 0 or end > size:
        raise ChannelError(f"an array of {spec.dtype} {spec.shape} at {spec.offset} in {size}")


def _view(memory: mmap.mmap | bytes, spec: ArraySpec) -> NDArray[Any]:
    view: NDArray[Any] = np.ndarray(spec.shape, spec.dtype, memory, spec.offset)
    return view
