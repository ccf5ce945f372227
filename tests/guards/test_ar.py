"""The serving path drives the models of transformers itself."""

from __future__ import annotations

import ast
from pathlib import Path

import sgl_diffusion

ROOM = Path(sgl_diffusion.__file__).parent / "ar"


def test_no_library_generates_for_us() -> None:
    files = sorted(ROOM.glob("**/*.py"))
    assert files
    for file in files:
        nodes = ast.walk(ast.parse(file.read_text()))
        assert "generate" not in {n.attr for n in nodes if isinstance(n, ast.Attribute)}, file
