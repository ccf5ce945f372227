"""A traced server in a process of its own, and the one connection a benchmark has to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]

Event = dict[str, Any]


class Server:
    def __init__(self, folder: Path, *flags: str) -> None:
        self.trace = folder / "trace.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("traced_server.py"))]
        self.process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data"), "--trace", str(self.trace), *flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        assert self.process.stdout is not None
        found = re.match(r"http://([\d.]+:\d+)", self.process.stdout.readline())
        assert found, "the server did not start"
        self.address = found[1]
        self.http = http.client.HTTPConnection(self.address, timeout=120)
        while self.call("GET", "/readyz")[0] != 200:
            time.sleep(0.05)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body)
        if self.http.sock is not None and select.select([self.http.sock], [], [], 0)[0]:
            self.http.close()  # the server has: a connection that rests is not kept for long
        self.http.request(method, path, data, {"Content-Type": "application/json"})
        answer = self.http.getresponse()
        return answer.status, answer.read()

    def made(self, method: str, path: str, body: Any = None) -> Any:
        status, data = self.call(method, path, body)
        assert status == 200, data[:500]
        return json.loads(data)

    def video(self, **body: Any) -> str:
        return str(self.made("POST", "/v1/videos", {"prompt": "x", **body})["id"])

    def wait(self, video: str, *states: str) -> None:
        while (state := self.made("GET", f"/v1/videos/{video}")["status"]) not in states:
            assert state != "failed", video
            time.sleep(0.02)

    def processor_seconds(self) -> float:
        """Of the server's threads, not of its worker."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def events(self, what: str) -> list[Event]:
        found = [json.loads(line) for line in self.trace.read_text().splitlines()]
        return [event for event in found if event["what"] == what]


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), *flags)
        try:
            yield server
        finally:
            server.http.close()
            server.process.terminate()
            server.process.wait(60)
