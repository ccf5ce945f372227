"""`sglang serve` on four CPU ranks answers like one rank, also when a rank is killed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.random_wan import build_tiny_wan
from tests.e2e.adapters import write_served
from tests.e2e.many import frames, pictures, ranks, same, start_server
from tests.e2e.server import ROOT, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # four processes load torch


def documented() -> tuple[str, ...]:
    """The flags of the start line in the docs, but for its model."""
    page = (ROOT / "docs/parallel.md").read_text().replace("\\\n", " ")
    line = next(line for line in page.splitlines() if line.startswith("sglang serve "))
    words = tuple(shlex.split(line))
    assert words[2:4] == ("--model-path", "M")
    return words[4:]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from start_server(tmp_path_factory.mktemp("one"), "--device", "cpu")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from start_server(tmp_path_factory.mktemp("four"), *documented())


def test_the_documented_line_runs_as_it_stands(four: Server) -> None:
    assert documented() == (
        "--text-encoder-cpu-offload", "--pin-cpu-memory", "--num-gpus", "4", "--ulysses-degree=2",
        "--ring-degree=2", "--port", "30010",
    )  # fmt: skip
    assert four.port == 30010 and len(ranks(four)) == 3
    log = four.log.read_text()
    assert "4 ranks: cfg 1 x ring 2 x ulysses 2" in log
    assert "text_encoder: " in log and "stay away" in log and "nothing to pin" in log


@pytest.mark.parametrize(
    "body",
    [
        {"size": "80x48", "seed": 1},
        {"size": "208x112", "seed": 2, "n": 2, "guidance_scale": 1.0},
        {"size": "16x16", "seed": 3},
    ],
    ids=["15 tokens", "two plain ones", "one token"],
)
def test_the_same_pictures(one: Server, four: Server, body: dict[str, Any]) -> None:
    same(pictures(one, **body), pictures(four, **body))


def test_the_same_pictures_with_an_adapter(one: Server, four: Server, tmp_path: Path) -> None:
    path = str(write_served(tmp_path, "a", 1, 4))
    body = {"size": "80x48", "seed": 1}
    base = pictures(four, **body)
    for server in (one, four):
        answer = server.http.post(
            "/v1/set_lora", json={"lora_nickname": "a", "lora_path": path, "strength": 0.7}
        )
        assert answer.status_code == 200, answer.text
    adapted = pictures(four, **body)
    same(pictures(one, **body), adapted)
    assert np.abs(adapted - base).max() > 8
    for server in (one, four):
        assert server.http.post("/v1/unmerge_lora_weights").status_code == 200
    assert np.array_equal(pictures(four, **body), base)


@pytest.mark.parametrize(
    "layout", [("--cfg-parallel-size", "2"), ("--ulysses-degree", "2")], ids=["cfg", "ulysses"]
)
def test_gated_guidance_is_that_of_one_rank(
    one: Server, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """Where the branches of guidance are apart, and where they are not."""
    body = {"size": "80x48", "seed": 1, "n": 2, "num_inference_steps": 8, "guidance_scale": 5.0}
    gated = {**body, "cfg_gate_step": 0.375}
    start = start_server(tmp_path, "--device", "cpu", "--num-gpus", "2", *layout)
    two = next(start)
    assert len(ranks(two)) == 1
    wanted = pictures(one, **gated)
    same(pictures(two, **gated), wanted)
    assert np.abs(wanted - pictures(one, **body)).max() > 8, "it is not the whole guidance"
    clip = {"seed": 3, "num_frames": 9, "num_inference_steps": 6, "cfg_gate_step": 0.4}
    clips = []
    for server in (one, two):
        video_id = server.video(**clip)
        assert server.finished(video_id)["status"] == "completed"
        clips.append(frames(server, video_id))
    assert np.abs(clips[0].astype(int) - clips[1].astype(int)).max() <= 8, "through a codec"
    start.close()


def test_a_cancelled_clip_leaves_the_ranks_together(four: Server) -> None:
    video_id = four.video(num_frames=17, num_inference_steps=200)
    four.wait_until("it runs", lambda: four.state(video_id)["progress"] > 0)
    assert four.http.delete(f"/v1/videos/{video_id}").status_code == 200
    assert pictures(four, size="80x48").shape == (1, 48, 80, 3)
    assert len(ranks(four)) == 3


def test_a_killed_rank(four: Server) -> None:
    """The group ends and starts again; the job runs once more and gives the same clip."""
    body = {"seed": 3, "num_frames": 9, "num_inference_steps": 40}
    undisturbed = four.video(**body)
    assert four.finished(undisturbed)["attempt"] == 1
    video_id = four.video(**body)
    four.wait_until("progress", lambda: four.state(video_id)["progress"] >= 10)
    before = ranks(four)
    os.kill(before[1], signal.SIGKILL)
    four.wait_until("not ready", lambda: not four.ready(), 30)
    four.wait_until("ready again", four.ready, 300)
    done = four.finished(video_id)
    assert (done["status"], done["attempt"]) == ("completed", 2)
    assert np.array_equal(frames(four, video_id), frames(four, undisturbed))
    assert not set(before) & set(ranks(four))
    assert not any(Path(f"/proc/{rank}").exists() for rank in before)


def test_the_only_other_listeners_are_on_loopback(four: Server) -> None:
    (worker,) = four.workers()
    sockets = set()
    for pid in [worker, *ranks(four)]:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
                sockets.add(found[1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                listening.append(fields[1].partition(":")[0])
    assert listening and set(listening) == {"0100007F"}


def test_the_server_takes_all_ranks_along(tmp_path: Path) -> None:
    start = start_server(tmp_path, "--num-gpus", "2", "--device", "cpu")
    server = next(start)
    (worker,) = server.workers()
    pids = [worker, *ranks(server)]
    assert len(pids) == 2
    server.kill(signal.SIGKILL)
    server.process.wait()

    def gone() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    server.wait_until("all ranks are gone", gone, 20)
    start.close()


def test_twelve_heads_on_eight_ranks(tmp_path: Path) -> None:
    """Four ranks have two heads, four have one; the tokens are as odd."""
    model = str(build_tiny_wan(tmp_path / "model", heads=12, head_dim=16))
    flags = ("--model-path", model, "--device", "cpu")
    many = ("--num-gpus", "8", "--ulysses-degree", "8")
    made = []
    for name, more in (("one", ()), ("eight", many)):
        (tmp_path / name).mkdir()
        start = start_server(tmp_path / name, *flags, *more)
        server = next(start)
        made.append([pictures(server, size=size, seed=1) for size in ("80x48", "176x112")])
        start.close()
    for ours, theirs in zip(*made, strict=True):
        same(ours, theirs)


def test_more_ranks_than_heads_end_the_start(tmp_path: Path) -> None:
    model = str(build_tiny_wan(tmp_path / "model", heads=2, head_dim=16))
    done = subprocess.run(
        [sys.executable, "-m", "sgl_diffusion.cli", "serve", "--port", "0", "--data-dir",
         str(tmp_path / "data"), "--model-path", model, "--num-gpus", "4", "--ulysses-degree", "4",
         "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "2 attention heads cannot be spread over 4 Ulysses ranks" in done.stderr
    assert "Valid Ulysses degrees of this model: 1 to 2" in done.stderr


def test_degrees_that_cannot_work_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sgl_diffusion.cli", "serve", "--port", "0", "--data-dir",
         str(tmp_path / "data"), "--num-gpus", "4", "--ulysses-degree", "3"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "cannot be arranged" in done.stderr
    assert "each divides 4: 1, 2, 4" in done.stderr
