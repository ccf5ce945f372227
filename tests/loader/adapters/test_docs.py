"""docs/lora.md names what the code reads and refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.client.generator import DiffGenerator
from sgl_diffusion.loader.adapters.families.registry import FAMILIES
from sgl_diffusion.loader.adapters.keys import parse
from sgl_diffusion.server import lora

PAGE = Path(__file__).parents[3] / "docs" / "lora.md"


def _section(title: str) -> str:
    return PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_way_to_use_one_is_there() -> None:
    text = _section("Ways to use one")
    fields = [name for name in EngineOptions.__dataclass_fields__ if name.startswith("lora_")]
    flags = {f"--{name.replace('_', '-')}" for name in fields}
    assert set(re.findall(r"--lora-[a-z-]+", text)) == flags
    methods = set(re.findall(r"generator\.(\w+)\(", text))
    assert methods == {name for name in vars(DiffGenerator) if "lora" in name} | {"generate"}
    served = {route.path for route in lora.router.routes}
    assert set(re.findall(r"/v1/\w+", text)) == served - {"/v1/loras/{nickname}"}


def test_every_family_and_convention_is_in_the_tables() -> None:
    formats, names = _section("Formats"), _section("Names of layers")
    for family in FAMILIES.values():
        assert family.name.split(",")[0] in names
        if family.native != "native names":
            assert family.native in formats
        assert family.flat in formats


def test_the_keys_of_the_table_are_read() -> None:
    cells = [row.split("|")[2] for row in _section("Formats").splitlines() if row.startswith("| ")]
    keys = [key.rstrip("…") for cell in cells[1:] for key in cell.split("`")[1::2]]
    whole = [key for key in keys if not key.endswith(("L", ".", "_"))]
    assert len(whole) > 20
    for key in whole:
        if key == ".alpha":
            key = "L.alpha"
        assert parse(key, {}) is not None, key


def test_what_the_page_refuses_is_refused() -> None:
    text = _section("Formats").partition("Refused")[2]
    for name in ("hada_t1", "lokr_t2", "lora_mid"):
        assert f"`{name}`" in text
        with pytest.raises(RequestError, match="Tucker"):
            parse(f"a.{name}{'.weight' if name == 'lora_mid' else ''}", {})
