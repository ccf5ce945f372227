"""Servers for the faults: one that many faults share, and one after the other on one folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import FaultServer, check


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    server = FaultServer(tmp_path_factory.mktemp("faults") / "data")
    try:
        yield server.wait_worker()
    finally:
        server.close()


@pytest.fixture
def server(shared: FaultServer) -> Iterator[FaultServer]:
    """The shared server; the invariants hold after every test."""
    yield shared.wait_worker()
    (shared.data_dir / "hold").unlink(missing_ok=True)
    check(shared)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., FaultServer]]:
    """Start servers one after the other on one data folder."""
    servers: list[FaultServer] = []

    def begin(*flags: str) -> FaultServer:
        servers.append(FaultServer(tmp_path / "data", *flags))
        return servers[-1]

    yield begin
    for made in servers:
        made.close()
