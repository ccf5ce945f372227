"""`sglang serve` with two replicas of two ranks each: one port, and no job lost with a replica."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e.adapters import write_served
from tests.e2e.many import frames, pictures, same, start_server
from tests.e2e.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # five processes load torch

FLAGS = ("--num-gpus", "4", "--dp-size", "2", "--ulysses-degree", "2", "--device", "cpu")
BODY = {"size": "80x48", "seed": 1}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from start_server(tmp_path_factory.mktemp("one"), "--device", "cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    starting = start_server(tmp_path_factory.mktemp("two"), *FLAGS)
    server = next(starting)
    try:
        server.wait_until("both are ready", lambda: healthy(server), 300)
        yield server
    finally:
        starting.close()


def healthy(server: Server) -> bool:
    samples = server.metrics()
    return all(any(f'replica="{n}"' in name for name in samples) for n in (0, 1)) and (
        len(server.workers()) == 2
    )


def both(server: Server, **body: Any) -> list[NDArray[np.int64]]:
    """Two requests at a time, so that each replica has one of them."""
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(pictures, server, **body) for _ in range(2)]
        return [one.result() for one in running]


def steps_of(server: Server) -> dict[str, float]:
    named = "denoise_rows_total{"
    return {name: value for name, value in server.metrics().items() if named in name}


def test_both_answer_like_one(one: Server, two: Server) -> None:
    expected = pictures(one, **BODY)

    def worked() -> bool:
        """Requests may be answered before the other replica is asked."""
        for answer in both(two, **BODY):
            same(expected, answer)
        return len(steps_of(two)) == 2

    two.wait_until("both worked", worked)
    assert two.http.get("/server_info").json()["dp_size"] == 2


def test_a_record_is_of_both(two: Server) -> None:
    assert two.http.post("/start_profile").status_code == 200
    both(two, **BODY)
    events = two.http.post("/stop_profile").json()["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert set(names.values()) == {"server", "diffusion-0", "diffusion-1"}
    assert len([e for e in events if e["name"] == "file"]) == 2


def test_adapters_are_in_both(one: Server, two: Server, tmp_path: Path) -> None:
    path = str(write_served(tmp_path, "a", 1, 4))
    base = pictures(two, **BODY)
    wish = {"lora_nickname": "a", "lora_path": path, "strength": 0.7}
    for server in (one, two):
        assert server.http.post("/v1/set_lora", json=wish).status_code == 200
    expected = pictures(one, **BODY)
    assert np.abs(expected - base).max() > 8
    for answer in both(two, **BODY):
        same(expected, answer)
    for server in (one, two):
        assert server.http.post("/v1/unmerge_lora_weights").status_code == 200
    for answer in both(two, **BODY):
        assert np.array_equal(answer, base)
    for answer in both(two, **BODY, lora=[{"nickname": "a", "strength": 0.7}]):
        same(expected, answer)


def test_a_killed_replica(two: Server) -> None:
    """Its clip goes to the other one, which answers all the while; it comes back as it was."""
    before = both(two, **BODY)[0]
    body = {"seed": 3, "num_frames": 17, "num_inference_steps": 200}
    clips = [two.video(**body) for _ in range(2)]
    for clip in clips:
        two.wait_until("progress", lambda clip=clip: two.state(clip)["progress"] >= 1)
    victim = two.workers()[0]
    os.kill(victim, signal.SIGKILL)
    assert two.ready()
    assert np.array_equal(pictures(two, **BODY), before)
    ends = [two.finished(clip) for clip in clips]
    assert [end["status"] for end in ends] == ["completed"] * 2
    assert sorted(end["attempt"] for end in ends) == [1, 2]
    assert np.array_equal(*(frames(two, clip) for clip in clips))
    two.wait_until("both again", lambda: len(two.workers()) == 2 and healthy(two), 300)
    assert victim not in two.workers()
    two.wait_until("the same", lambda: len(steps_of(two)) == 2)


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be shared by 3 replicas"):
        Server(tmp_path / "data", "--num-gpus", "4", "--dp-size", "3")
