"""What benchmarks and examples import of ours is there: no test runs all of them."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("sgl_diffusion", "benchmarks", "examples", "tests")
SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything it takes from a module of ours."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.partition(".")[0] in OURS:
                yield from ((module, alias.name) for alias in node.names)


def has(module: str, name: str) -> bool:
    """Whether a module defines, imports or contains something of this name."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return False
    for place in map(Path, spec.submodule_search_locations or ()):
        if (place / name).is_dir() or (place / f"{name}.py").exists():
            return True
    if spec.origin is None:
        return False
    words = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            words.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            words.add(node.id)
    return name in words


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_imports_are_there(path: Path) -> None:
    for module, name in imports(path):
        assert has(module, name), f"{path} imports {name} from {module}"


def test_what_is_not_there_is_seen() -> None:
    assert has("benchmarks.harness", "machine") and has("tests.checkpoints", "random_wan")
    assert not has("benchmarks.harness", "nothing") and not has("sgl_diffusion.no_such", "x")
