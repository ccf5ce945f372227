"""Where the tensors of a safetensors file are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sgl_diffusion.loader.files import damaged

# The names of the format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor: its dtype by the name that the format has for it, and where it begins."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of a file by its key."""
    try:
        # The library checks the header as a whole, and that the file ends where it says.
        with safe_open(file, framework="pt"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError):
        raise damaged(file) from None
    return {
        key: Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }
