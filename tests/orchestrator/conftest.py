"""The two homes of a job table, for tests that have to pass over both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import postgres


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    with postgres.running() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str | None:
    """What `JobStore.open` gets besides its folder."""
    if request.param == "sqlite":
        return None
    found: str = request.getfixturevalue("database")
    postgres.fresh(found)
    return found
