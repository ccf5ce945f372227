"""Four ranks that the tests of a module share: no other module's tests have them as children."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks, running_ranks


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with running_ranks(4, tmp_path_factory.mktemp("ranks")) as started:
        yield started
