"""Two machines run one model: here machine 1 is a network namespace, joined by a virtual cable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.many import pictures, same, start_server
from tests.e2e.server import ROOT, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # six processes load torch

SPACE, HERE, THERE = "sgld-node1", "10.123.45.1", "10.123.45.2"
BODY = {"size": "80x48", "seed": 1}


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    """An address here and one in a namespace of its own, which reach each other and no more."""
    try:
        if not ip("netns", "add", SPACE):
            pytest.skip("network namespaces cannot be made here")
    except FileNotFoundError:
        pytest.skip("there is no ip command here")
    try:
        assert ip("link", "add", "sgld0", "type", "veth", "peer", "name", "sgld1", "netns", SPACE)
        assert ip("addr", "add", f"{HERE}/30", "dev", "sgld0") and ip("link", "set", "sgld0", "up")
        inside = ("netns", "exec", SPACE, "ip")
        assert ip(*inside, "addr", "add", f"{THERE}/30", "dev", "sgld1")
        assert ip(*inside, "link", "set", "sgld1", "up") and ip(*inside, "link", "set", "lo", "up")
        yield
    finally:
        ip("link", "del", "sgld0")
        ip("netns", "del", SPACE)


@contextmanager
def machine_1(folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    with (folder / "machine1.log").open("w") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", SPACE, sys.executable, "-m", "sgl_diffusion.cli", "serve",
             "--data-dir", str(folder / "data1"), *flags, "--node-rank", "1"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()


def ranks_of(pid: int) -> list[int]:
    """The processes below one, the nearest first."""
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return below + [deeper for child in below for deeper in ranks_of(child)]


def test_two_machines_answer_like_one(cable: None, tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--num-gpus", "2", "--nnodes", "2",
             "--dist-init-addr", f"{HERE}:29507")  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    alone = start_server(one, "--device", "cpu")
    expected = pictures(next(alone), **BODY)
    alone.close()
    with machine_1(tmp_path, *flags) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == f"machine 1 of 2, follows {HERE}:29507\n"
        starting = start_server(two, *flags)
        try:
            server: Server = next(starting)
            same(expected, pictures(server, **BODY))
            assert "2 ranks: cfg " in server.log.read_text()
            (lost,) = ranks_of(other.pid)
            os.kill(lost, signal.SIGKILL)
            server.wait_until("not ready", lambda: not server.ready(), 60)
            server.wait_until("ready again", server.ready, 600)
            assert np.array_equal(pictures(server, **BODY), pictures(server, **BODY))
            same(expected, pictures(server, **BODY))
            assert lost not in ranks_of(other.pid)
        finally:
            starting.close()
    assert other.returncode == 0
