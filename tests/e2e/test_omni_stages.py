"""A server whose stages have a process each, by its file, and each of them dies once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sgl_diffusion.apps.omni import STAGES
from tests.e2e.server import Server
from tests.e2e.test_omni import OmniServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPOKEN: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a cat on the river"}],
    "modalities": ["text", "audio"],
    "audio": {"format": "wav"},
    "temperature": 0,
    "talker_temperature": 0,
    "max_tokens": 8,
    "talker_max_new_tokens": 16,
}


@pytest.fixture(scope="module")
def server(
    tiny_qwen3_omni: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, dict[str, int]]]:
    """With the process of each stage, in which it was started."""
    folder = tmp_path_factory.mktemp("stages")
    file = folder / "omni.yaml"
    lines = [f"model_path: {tiny_qwen3_omni}", "process:", *(f"- {stage}" for stage in STAGES)]
    file.write_text("\n".join(lines))
    running = OmniServer(folder / "data", "--config", str(file))
    try:
        running.wait_ready()
        yield running, dict(zip(STAGES, sorted(running.workers()), strict=True))
    finally:
        running.close()


def replace(server: Server, places: dict[str, int], stage: str) -> None:
    """Kill its process, and note the one that is started instead."""
    others = {process for name, process in places.items() if name != stage}
    old = places[stage]
    os.kill(old, signal.SIGKILL)
    (places[stage],) = server.wait_until("another", lambda: set(server.workers()) - others - {old})
    assert others <= set(server.workers())


def ask(server: Server) -> httpx.Response:
    return server.http.post("/v1/chat/completions", json=SPOKEN, timeout=300)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_dies_is_told_of_and_comes_back_alone(
    server: tuple[Server, dict[str, int]], stage: str
) -> None:
    running, places = server
    whole = ask(running).json()["choices"][0]["message"]
    before = running.http.get("/health").json()["restarts"]
    replace(running, places, stage)
    health = running.wait_until(
        "unhealthy", lambda: (h := running.http.get("/health")).status_code == 503 and h
    )
    assert health.json()["status"] == "unhealthy" and health.headers["retry-after"]
    assert f"Stage {stage}:" in health.json()["reason"]
    again = ask(running).json()["choices"][0]["message"]
    assert again["content"] == whole["content"]
    assert again["audio"]["data"] == whole["audio"]["data"]
    running.wait_until("healthy", running.ready)
    assert running.http.get("/health").json() == {
        "status": "healthy", "running": True, "restarts": before + 1,
    }  # fmt: skip


def test_an_answer_whose_stage_dies_twice_fails_and_says_so(
    server: tuple[Server, dict[str, int]],
) -> None:
    """Once it begins anew: a stage may die of something else."""
    running, places = server
    endless = {**SPOKEN, "modalities": ["text"], "n": 16, "max_tokens": 7000, "temperature": 1}
    del endless["audio"]

    def steps() -> float:
        return sum(
            value for name, value in running.metrics().items() if "decode_steps_total" in name
        )

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.http.post, "/v1/chat/completions", json=endless, timeout=600)
        for _ in range(2):
            running.wait_until("ready", running.ready)
            begun = steps()
            running.wait_until("at work", lambda begun=begun: steps() > begun)
            assert not answer.done()
            replace(running, places, "thinker")
        failed = answer.result(timeout=60)
    assert failed.status_code == 503 and failed.json()["error"]["code"] == "worker_lost"
    running.wait_until("ready", running.ready)
    assert ask(running).status_code == 200
