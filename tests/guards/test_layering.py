"""Imports go one way: a module imports only from rooms of a lower rank."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sgl_diffusion"
RANKS = {
    "base": 0,
    "ops": 1,
    "distributed": 1,
    "loader": 1,
    "orchestrator": 1,
    "attention": 2,
    "layers": 3,
    "models": 4,
    "components": 4,
    "engine": 5,
    "ar": 5,
    "recipes": 6,
    "apps": 7,
    "client": 8,
    "server": 9,
    "bench": 9,
    "cli": 10,
}
TORCH_FREE = ("base", "orchestrator", "apps", "client", "server", "cli")
HEAVY = {"torch", "triton", "diffusers", "transformers", "accelerate", "flash_attn"}
FOLDERS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())


def module_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of imports that run when the module is imported."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def violations(room: str, path: Path, source: str) -> list[str]:
    found = []
    for line, name in module_level_imports(ast.parse(source)):
        parts = name.split(".")
        if name.startswith("."):
            found.append(f"{path}:{line} is a relative import")
        if room in TORCH_FREE and parts[0] in HEAVY:
            found.append(f"{path}:{line} imports {parts[0]} at module level")
        if parts[0] != "sgl_diffusion" or len(parts) < 2 or parts[1] not in RANKS:
            continue
        if parts[1] != room and RANKS[parts[1]] >= RANKS[room]:
            found.append(f"{path}:{line} ({room}) imports {name}")
    return found


def test_every_room_has_a_rank() -> None:
    assert set(FOLDERS) <= set(RANKS), "a new room needs a rank in ARCHITECTURE.md and here"


@pytest.mark.parametrize("room", FOLDERS)
def test_imports_go_downwards(room: str) -> None:
    found = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        found += violations(room, path.relative_to(PACKAGE.parent), path.read_text())
    assert not found, "\n".join(found)


def test_the_guard_sees_an_upward_import() -> None:
    path = Path("x.py")
    assert violations("engine", path, "from sgl_diffusion.server.app import create_app")
    assert violations("engine", path, "from sgl_diffusion import recipes")
    assert violations("server", path, "import torch")
    assert violations("engine", path, "from .job import Job")
    assert violations("loader", path, "import sgl_diffusion.orchestrator.messages")
    assert not violations("engine", path, "def f():\n    import sgl_diffusion.server")
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sgl_diffusion.server"
    assert not violations("engine", path, lazy)


def test_kernels_and_csrc_know_nothing_of_the_package() -> None:
    root = PACKAGE.parent
    for path in sorted((root / "kernels").rglob("*.py")):
        names = [name for _, name in module_level_imports(ast.parse(path.read_text()))]
        outside = [n for n in names if n.startswith("sgl_diffusion.")]
        assert all(n.startswith("sgl_diffusion.kernels") for n in outside), path
    assert not (root / "kernels" / "__init__.py").exists(), "it would shadow a published package"


def test_only_env_reads_the_environment_and_only_cli_reads_argv() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        if path != PACKAGE / "base" / "env.py":
            assert "os.environ" not in source and "getenv" not in source, path
        if "cli" not in path.parts:
            assert "sys.argv" not in source and "argparse" not in source, path
