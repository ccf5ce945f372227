"""Fixtures for every test, and the tests that a plain run leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

# Every file there defines the fixtures of one model family.
_FAMILIES = sorted((Path(__file__).parent / "checkpoints").glob("tiny_*.py"))
pytest_plugins = [
    "tests.fixtures_wan",
    "tests.fixtures_ranks",
    *(f"tests.checkpoints.{f.stem}" for f in _FAMILIES),
]
LEFT_OUT = ("gpu", "multigpu", "slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marked tests run only where `-m` names a marker."""
    if config.getoption("-m"):
        return
    marked = [item for item in items if any(item.get_closest_marker(m) for m in LEFT_OUT)]
    if marked:
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]
