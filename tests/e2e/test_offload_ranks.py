"""Weights that come block by block, on two ranks behind `sglang serve`: the pictures of one rank
that has them all, also after a clip was cancelled and a rank was killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from tests.e2e.many import frames, pictures, ranks, same, start_server
from tests.e2e.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # each process loads torch

AWAY = ("--dit-layerwise-offload", "--text-encoder-cpu-offload", "--vae-cpu-offload")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from start_server(tmp_path_factory.mktemp("one"), "--device", "cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--device", "cpu", "--num-gpus", "2", "--ulysses-degree", "2", *AWAY)
    yield from start_server(tmp_path_factory.mktemp("two"), *flags)


def test_the_same_pictures(one: Server, two: Server) -> None:
    offload = two.http.get("/server_info").json()["offload"]
    assert {part["component"] for part in offload} == {"text_encoder", "transformer", "vae"}
    assert len(ranks(two)) == 1
    for body in ({"size": "80x48", "seed": 1}, {"size": "112x64", "seed": 2, "n": 2}):
        same(pictures(one, **body), pictures(two, **body))


def test_a_cancelled_clip_leaves_the_weights_in_order(one: Server, two: Server) -> None:
    body = {"size": "80x48", "seed": 4}
    video_id = two.video(num_frames=17, num_inference_steps=200)
    two.wait_until("it runs", lambda: two.state(video_id)["progress"] > 0)
    assert two.http.delete(f"/v1/videos/{video_id}").status_code == 200
    same(pictures(one, **body), pictures(two, **body))


def test_a_killed_rank(two: Server) -> None:
    body = {"seed": 3, "num_frames": 9, "num_inference_steps": 40}
    undisturbed = two.video(**body)
    assert two.finished(undisturbed)["attempt"] == 1
    video_id = two.video(**body)
    two.wait_until("progress", lambda: two.state(video_id)["progress"] >= 10)
    (other,) = ranks(two)
    os.kill(other, signal.SIGKILL)
    done = two.finished(video_id)
    assert (done["status"], done["attempt"]) == ("completed", 2)
    assert np.array_equal(frames(two, video_id), frames(two, undisturbed))
