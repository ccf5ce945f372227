"""Blank pictures, for trying out a model that does nothing without one."""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EDGE = 64
_GRAY = b"\x80"


@contextmanager
def blank_pictures(count: int) -> Iterator[tuple[str, ...]]:
    """Paths of `count` gray PNG files that are gone at the end."""
    if count == 0:
        yield ()
        return
    with tempfile.TemporaryDirectory(prefix="sgl-diffusion-") as folder:
        paths = [Path(folder) / f"{index}.png" for index in range(count)]
        for path in paths:
            path.write_bytes(_png())
        yield tuple(map(str, paths))


def _png() -> bytes:
    header = struct.pack(">IIBBBBB", _EDGE, _EDGE, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + _GRAY * _EDGE) * _EDGE)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
