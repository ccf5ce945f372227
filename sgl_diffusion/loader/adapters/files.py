"""Reads the tensors of an adapter file, which somebody else may have written to do harm.

The header is checked before anything else is read: its length, and that every tensor lies inside
the file, has the size that its shape says and shares no bytes with another.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.keys import shown
from sgl_diffusion.loader.files import is_pointer

MOST_HEADER = 100_000_000
MOST_KEY = 1000

_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# Every value of an 8-bit float is one of bfloat16, too.
_WIDENED = {
    torch.float64: torch.float32,
    torch.float8_e4m3fn: torch.bfloat16,
    torch.float8_e5m2: torch.bfloat16,
}


@dataclass(frozen=True, eq=False)
class File:
    """The tensors of a file and the notes in its header."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def read_file(path: Path) -> File:
    """Every tensor of a safetensors file, in memory of its own."""
    metadata = check_header(path)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():
                # A copy: the file may change or vanish while the adapter is merged.
                tensors[key] = _checked(key, handle.get_tensor(key).clone())
    except (SafetensorError, OSError):
        raise _damaged(path, "it cannot be read as safetensors") from None
    return File(metadata, tensors)


def check_header(path: Path) -> dict[str, str]:
    """The notes in a file's header, after all of the header was found to be sound."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, "it is not a regular file")
        with path.open("rb") as file:
            length, header = _header(path, file, status.st_size)
    except OSError as error:
        raise RequestError(
            f"The adapter file {shown(path.name)} cannot be opened: {error.strerror}.",
            hint="Check the path and its permissions.",
            code="invalid_lora",
        ) from None
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise _damaged(path, "the notes in its header are not texts")
    end = 0
    for start, stop, key in sorted(_range(path, key, entry) for key, entry in header.items()):
        if start < end:
            raise _damaged(path, f"{shown(key)} shares bytes with another tensor")
        if stop > status.st_size - 8 - length:
            raise _damaged(path, f"{shown(key)} ends after the end of the file")
        end = stop
    return notes


def _header(path: Path, file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise _damaged(path, "it is empty" if size == 0 else f"it has {size} bytes")
    if is_pointer(path):
        raise _damaged(path, "it is a pointer of Git LFS, see `git lfs pull`")
    if length > MOST_HEADER:
        raise _damaged(path, f"its header has {length} bytes, at most {MOST_HEADER} are allowed")
    if 8 + length > size:
        raise _damaged(path, f"its header has {length} bytes, the whole file {size}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return length, header


def _range(path: Path, key: str, entry: object) -> tuple[int, int, str]:
    """Where a tensor lies, after its entry was found to be consistent."""
    if len(key) > MOST_KEY:
        raise _damaged(path, f"the name of a tensor has {len(key)} characters")
    if isinstance(entry, dict):
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        width = _SIZES.get(str(entry.get("dtype")))
        if width is None:
            raise _damaged(path, f"{shown(key)} has the type {shown(str(entry.get('dtype')))}")
        if _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
            start, stop = offsets
            if stop - start == math.prod(shape) * width:
                return start, stop, key
    raise _damaged(path, f"the place of {shown(key)} in it does not fit its shape")


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def _checked(key: str, tensor: Tensor) -> Tensor:
    tensor = tensor.to(_WIDENED.get(tensor.dtype, tensor.dtype))
    if tensor.is_floating_point() and not is_finite(tensor):
        raise RequestError(
            f"{shown(key)} holds values that are not finite.",
            hint="The adapter is damaged; export or download it again.",
            code="invalid_lora",
        )
    return tensor


def is_finite(tensor: Tensor) -> bool:
    # The sum is much faster, and only finite where all values are.
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _damaged(path: Path, why: str) -> RequestError:
    return RequestError(
        f"The adapter file {shown(path.name)} is damaged: {why}.",
        hint="Download it again, or export it as safetensors.",
        code="invalid_lora",
    )
