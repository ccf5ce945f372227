"""What the tests of omni models ask about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ar.chats import make_media


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_media(tmp_path_factory.mktemp("media"))
