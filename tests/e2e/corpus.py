"""Reads data/bad_inputs.yaml: tags that make long texts, files and pictures; rows with a name."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

Group = str


@dataclass(frozen=True)
class Row:
    name: str
    given: list[Any]
    status: int
    code: str
    param: str


class _Loader(yaml.SafeLoader):
    pass


def _sequence(loader: yaml.SafeLoader, node: yaml.Node) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
    return loader.construct_mapping(node, deep=True)


def _repeat(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    text, times = _sequence(loader, node)
    return text * times


def _join(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return "".join(_sequence(loader, node))


def _file(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[str, bytes, str]:
    given = _mapping(loader, node)
    return given.get("name", "x.png"), given["data"].encode(), "image/png"


def _picture(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[str, bytes, str]:
    given = _mapping(loader, node)
    kind = given["kind"]
    image = Image.new("RGB", tuple(given.get("size", (64, 64))), (200, 60, 20))
    mode = given.get("mode", "RGB")
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    options: dict[str, Any] = {}
    if "frames" in given:
        others = [
            Image.new("RGB", image.size, (i % 256, i // 256, 9)) for i in range(given["frames"])
        ]
        options = {"save_all": True, "append_images": others}
    if "orientation" in given:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = given["orientation"]
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    data = buffer.getvalue()
    data = data[: int(len(data) * given.get("cut", 1))]
    return given.get("name", f"x.{kind}"), data, "application/octet-stream"


def _claim(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[str, bytes, str]:
    """A small PNG whose header claims a size."""
    width, height = _sequence(loader, node)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "x.png", b"\x89PNG\r\n\x1a\n" + chunks, "image/png"


for _name, _make in {
    "!repeat": _repeat,
    "!join": _join,
    "!file": _file,
    "!picture": _picture,
    "!claim": _claim,
    "!hex": lambda loader, node: bytes.fromhex(loader.construct_scalar(node)),
}.items():
    _Loader.add_constructor(_name, _make)


def load(path: Path) -> dict[Group, list[Row]]:
    groups = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    return {
        group: [_row(group, i, row) for i, row in enumerate(rows)] for group, rows in groups.items()
    }


def _row(group: Group, index: int, row: list[Any]) -> Row:
    if group == "fine":
        return Row(f"{index}", row, 200, "-", "-")
    *given, answer = row
    status, code, param = answer.split()
    if group in ("json", "bodies", "requests"):
        given = [_bytes(part) for part in given]
    if group in ("forms", "edits"):
        given = [[(name, _part(value)) for name, value in given[0]]]
    return Row(f"{index}-{code}-{param}", given, int(status), code, param)


def _bytes(part: Any) -> Any:
    return part.encode() if isinstance(part, str) else part


def _part(value: Any) -> Any:
    return value if isinstance(value, tuple) else (None, value)
