"""A server whose talker and decoder of speech have processes of their own, one of which dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server
from tests.e2e.test_omni import OmniServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def server(tiny_qwen3_omni: Path, tmp_path: Path) -> Iterator[Server]:
    running = OmniServer(
        tmp_path / "data",
        *("--model-path", str(tiny_qwen3_omni)),
        *("--process", "talker,code2wav"),
    )
    try:
        yield running.wait_ready()
    finally:
        running.close()


def test_a_stage_that_dies_is_told_of_and_comes_back_alone(server: Server) -> None:
    body = {"input": "a cat on the river", "seed": 2, "temperature": 0, "max_new_tokens": 20}
    whole = server.http.post("/v1/audio/speech", json=body)
    assert whole.status_code == 200
    first, second = sorted(server.workers())  # in the order in which they were started
    os.kill(second, signal.SIGKILL)
    health = server.wait_until(
        "unhealthy", lambda: (h := server.http.get("/health")).status_code == 503 and h
    )
    assert "talker+code2wav" in health.json()["reason"]
    again = server.http.post("/v1/audio/speech", json=body)
    assert again.content == whole.content
    assert server.http.get("/health").json() == {
        "status": "healthy", "running": True, "restarts": 1,
    }  # fmt: skip
    assert first in server.workers() and second not in server.workers()
