"""A real `sglang serve` process with the tiny model, its worker, and a data folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


class Server:
    module = "sgl_diffusion.cli"
    command: tuple[str, ...] = ("serve",)

    def __init__(
        self,
        data_dir: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.log = data_dir.with_name(f"{data_dir.name}-{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.command, "--port", "0",
                 "--data-dir", str(data_dir), *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                cwd=cwd,
            )  # fmt: skip
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        found = re.match(r"http://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+)  model: ", self.first_line)
        if not found:  # leave no child behind: other tests count theirs
            self.process.kill()
            self.process.communicate()
        assert found, f"{self.first_line!r}\n{self.log.read_text()}"
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait_until(self, what: str, check: Callable[[], Any], seconds: float = 90) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := check()):
            told = f"not within {seconds} s: {what}"
            assert time.monotonic() < deadline, f"{told}\n{self.log.read_text()[-4000:]}"
            time.sleep(0.05)
        return value

    def wait_ready(self) -> Server:
        self.wait_until("ready", self.ready)
        return self

    def ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:  # between the first line and the first accept
            return False

    def metrics(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    def workers(self) -> list[int]:
        """Children of the server, as /proc knows them."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def video(self, **body: Any) -> str:
        answer = self.http.post("/v1/videos", json={"prompt": "waves", "size": "64x64", **body})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def state(self, video_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/v1/videos/{video_id}").json())

    def finished(self, video_id: str) -> dict[str, Any]:
        def check() -> dict[str, Any] | None:
            state = self.state(video_id)
            return state if state["status"] in ("completed", "failed") else None

        return dict(self.wait_until(f"{video_id} ends", check))

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running_server(data_dir: Path, *flags: str) -> Iterator[Server]:
    """A server that is ready; it is gone at the end."""
    server = Server(data_dir, *flags)
    try:
        yield server.wait_ready()
    finally:
        server.close()
