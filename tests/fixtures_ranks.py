"""Four ranks that all tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks, running_ranks


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with running_ranks(4, tmp_path_factory.mktemp("ranks")) as started:
        yield started
