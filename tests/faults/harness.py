"""A server process with the failing engine, and what must hold after every fault."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from PIL import Image

from tests.e2e.server import ROOT, Server
from tests.faults.engine import brightness

FLAGS = ("--served-model-name", "fake", "--worker-timeout", "2", "--min-free-gb", "0.01")


class FaultServer(Server):
    module = "tests.faults.serve"
    command = ()

    def __init__(self, data_dir: Path, *flags: str) -> None:
        self.data_dir = data_dir
        super().__init__(data_dir, *FLAGS, *flags)

    def wait_worker(self) -> FaultServer:
        """Until a job would run. /readyz also remembers how often workers died lately."""
        self.wait_until("a worker", lambda: self.sample("worker_ready") == 1)
        return self

    def sample(self, name: str) -> float:
        try:
            return self.metrics().get(f"sgld_{name}", 0.0)
        except httpx.TransportError:  # between the first line and the first accept
            return 0.0

    def hold(self) -> Path:
        """Jobs that are to be held are, until the file is gone."""
        marker = self.data_dir / "hold"
        marker.touch()
        return marker

    def image(self, prompt: str = "a cat", **body: Any) -> httpx.Response:
        asked = {"prompt": prompt, "size": "32x32", "response_format": "url", **body}
        return self.http.post("/v1/images/generations", json=asked)

    def make(self, prompt: str = "waves", seed: int = 7, **body: Any) -> str:
        return self.video(prompt=prompt, seed=seed, size="32x32", num_frames=5, **body)

    def delete(self, video_id: str) -> int:
        return self.http.delete(f"/v1/videos/{video_id}").status_code

    def terminate(self) -> int:
        self.kill(signal.SIGTERM)
        return self.process.wait(90)

    def die(self) -> list[int]:
        """kill -9; returns the process ids of the workers it had."""
        workers = self.workers()
        self.kill(signal.SIGKILL)
        self.process.wait()
        return workers


def failing_start(data_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A server that is not expected to come up."""
    command = [sys.executable, "-m", "tests.faults.serve", "--data-dir", str(data_dir)]
    return subprocess.run(
        [*command, *FLAGS, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def gone(pid: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def history(data_dir: Path) -> dict[str, list[str]]:
    """The kinds of events of every job, in order."""
    found: dict[str, list[str]] = {}
    with closing(sqlite3.connect(f"file:{data_dir}/jobs.db?mode=ro", uri=True)) as db:
        for job_id, kind in db.execute("SELECT job_id, kind FROM events ORDER BY number"):
            found.setdefault(job_id, []).append(kind)
    return found


def rows(data_dir: Path) -> dict[str, tuple[str, str, str]]:
    """Kind, status and seeds of every row."""
    with closing(sqlite3.connect(f"file:{data_dir}/jobs.db?mode=ro", uri=True)) as db:
        found = db.execute("SELECT id, kind, status, seeds FROM jobs").fetchall()
    return {row[0]: row[1:] for row in found}


def check(server: FaultServer, *, pretended: bool = True) -> None:
    """The invariants; each also names the class of faults that would break it. What is pretended
    tells its seed."""
    server.wait_worker()
    data_dir = server.data_dir
    with closing(sqlite3.connect(f"file:{data_dir}/jobs.db?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    # Queue gauge and rows agree as soon as nothing is between them.
    server.wait_until("the gauge follows the rows", lambda: _gauge_is_true(server))
    stored = rows(data_dir)
    for job_id, (kind, status, seeds) in stored.items():
        if status == "completed" and pretended:
            _decodes(data_dir, kind, job_id, seeds)
    for path in (*(data_dir / "videos").iterdir(), *(data_dir / "images").iterdir()):
        owner = "_".join(path.stem.split("_")[:2])
        assert owner in stored or _is_fresh(path), f"{path} has no row"
    for job_id, kinds in history(data_dir).items():
        ends = [kind for kind in kinds if kind in ("completed", "failed")]
        assert len(ends) <= 1, f"{job_id} ended twice: {kinds}"
        if ends and "rebuilt" not in kinds:
            after = kinds[kinds.index(ends[0]) + 1 :]
            assert set(after) <= {"deleted", "expired"}, f"{job_id} went on after its end: {kinds}"
    assert len(server.workers()) == 1
    good = server.image()
    assert good.status_code == 200, good.text


def _gauge_is_true(server: FaultServer) -> bool:
    queued = sum(
        kind == "video" and status == "queued" for kind, status, _ in rows(server.data_dir).values()
    )
    return server.sample('queue_depth{kind="video"}') == queued


def _decodes(data_dir: Path, kind: str, job_id: str, seeds: str) -> None:
    for index, seed in enumerate(map(int, seeds.strip("[]").split(","))):
        if kind == "video":
            number = f"_{index}" if index else ""
            path = data_dir / "videos" / f"{job_id}{number}.mp4"
            with av.open(io.BytesIO(path.read_bytes())) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(frames) == 5
            assert abs(np.mean(frames) - brightness(seed)) < 6, f"{path} is of another seed"
        else:
            (path,) = (data_dir / "images").glob(f"{job_id}_{index}.*")
            with Image.open(path) as picture:
                assert picture.convert("RGB").getpixel((0, 0)) == (brightness(seed),) * 3


def _is_fresh(path: Path) -> bool:
    """Being written, or removed, at this moment."""
    try:
        return time.time() - path.stat().st_mtime < 2.0
    except FileNotFoundError:
        return True
