"""The shell around the engine: what HTTP adds, polls, encoding beside denoising, memory.

    python benchmarks/bench_server.py [--requests 200] [--soak 2000] [--out FILE]

latency   a 512x512 PNG as b64_json, less a bare engine call in turns with it and less its own PNG
          encoding: what is left is the HTTP path. Bar: 5 ms in the median.
polls     status polls over kept-alive connections while videos run. Bar: 1,000 a second and core.
overlap   denoise steps of the next video while the last one is encoded. Bar: none is longer.
memory    resident memory of the server over many image requests. Bar: 1 MB per 1,000.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.fake_engine import fake_app
from benchmarks.harness import machine
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.client.client import Client

STEP_MS = 5.0
WARM = 10
TICK = os.sysconf("SC_CLK_TCK")
BODY = {"prompt": "x", "size": "512x512", "response_format": "b64_json"}


class Server:
    def __init__(self, folder: Path, *flags: str) -> None:
        self.trace = folder / "trace.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
        self.process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data"), "--trace", str(self.trace), *flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
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
            self.http.close()  # the server has: connections that rest are not kept for long
        self.http.request(method, path, data, {"Content-Type": "application/json"})
        answer = self.http.getresponse()
        return answer.status, answer.read()

    def made(self, method: str, path: str, body: Any = None) -> Any:
        status, data = self.call(method, path, body)
        assert status == 200, data[:500]
        return json.loads(data)

    def video(self, **body: Any) -> str:
        return str(self.made("POST", "/v1/videos", {"prompt": "x", **body})["id"])

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.trace.read_text().splitlines()]


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


def latency(server: Server, requests: int) -> dict[str, Any]:
    """Milliseconds of a request, of the bare engine call before it, and of its own PNG encoding."""
    https, engines = [], []

    async def run() -> None:
        client = Client(fake_app({"step_ms": STEP_MS, "trace": ""}))
        await client.start()
        await client.ready()
        params = client.resolve(SamplingParams(prompt="x"), video=False)
        for _ in range(requests + WARM):
            start = time.perf_counter()
            await (await client.submit(params)).result()
            engines.append(time.perf_counter() - start)
            start = time.perf_counter()
            status, _ = server.call("POST", "/v1/images/generations", BODY)
            https.append(time.perf_counter() - start)
            assert status == 200
        await client.stop()

    asyncio.run(run())
    pngs = [
        event["end"] - event["begin"] for event in server.events() if event["what"] == "picture"
    ]
    rows = [tuple(1000 * part for part in row) for row in zip(https, engines, pngs, strict=True)]
    medians = [statistics.median(column) for column in zip(*rows[WARM:], strict=True)]
    added = [whole - engine - png for whole, engine, png in rows[WARM:]]
    return {
        **dict(zip(("http_ms", "engine_ms", "png_ms"), medians, strict=True)),
        "added_ms": statistics.median(added),
        "added_p95_ms": statistics.quantiles(added, n=20)[18],
    }


async def _poll(address: str, path: str, until: float) -> int:
    """Polls one after the other over one connection; answers counted."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
    count = 0
    while time.perf_counter() < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length is not None
        await reader.readexactly(int(length[1]))
        count += 1
    writer.close()
    return count


def polls(server: Server, seconds: float, connections: int = 8) -> dict[str, Any]:
    """Polls of a running, a waiting and a finished video."""
    done = server.video(num_inference_steps=1, num_frames=1, size="64x64")
    while server.made("GET", f"/v1/videos/{done}")["status"] != "completed":
        time.sleep(0.05)
    ids = [done, *(server.video(num_inference_steps=200) for _ in range(40))]
    while server.made("GET", f"/v1/videos/{ids[1]}")["status"] == "queued":
        time.sleep(0.01)

    async def run() -> int:
        until = time.perf_counter() + seconds
        paths = [f"/v1/videos/{ids[i % 3]}" for i in range(connections)]
        return sum(await asyncio.gather(*(_poll(server.address, p, until) for p in paths)))

    before, start = server.cpu_seconds(), time.perf_counter()
    count = asyncio.run(run())
    wall, cpu = time.perf_counter() - start, server.cpu_seconds() - before
    for video in ids:
        server.made("DELETE", f"/v1/videos/{video}")
    return {"per_second": count / wall, "per_core_second": count / cpu, "cpu_us": 1e6 * cpu / count}


def overlap(server: Server, videos: int = 6) -> dict[str, Any]:
    """Steps that run while a file is encoded, against those that do not: milliseconds."""
    size = {"size": "512x512", "num_frames": 33, "num_inference_steps": 40}
    ids = {server.video(**size) for _ in range(videos)}
    for video in ids:
        while server.made("GET", f"/v1/videos/{video}")["status"] != "completed":
            time.sleep(0.1)
    events = [event for event in server.events() if event["job"] in ids]
    encodes = [(e["begin"], e["end"]) for e in events if e["what"] == "encode"]
    steps = [(e["begin"], e["end"]) for e in events if e["what"] == "step"]
    during, alone = [], []
    for begin, end in steps:
        inside = any(begin < stop and end > start for start, stop in encodes)
        (during if inside else alone).append(1000 * (end - begin))
    assert len(encodes) == videos and during and alone, (len(encodes), len(during), len(alone))
    seconds = statistics.median(stop - start for start, stop in encodes)
    return {
        "encode_s": seconds,
        "steps_during": len(during),
        "step_during_ms": statistics.median(during),
        "step_alone_ms": statistics.median(alone),
    }


def memory(server: Server, requests: int) -> dict[str, Any]:
    """The slope of resident memory over the second half, in MB per 1,000 requests."""
    body = BODY | {"size": "256x256", "num_inference_steps": 1}
    samples = []
    for count in range(requests):
        status, _ = server.call("POST", "/v1/images/generations", body)
        assert status == 200
        if count >= requests // 2 and count % 20 == 0:
            samples.append((count / 1000, server.resident_mb()))
    slope = statistics.linear_regression(*zip(*samples, strict=True)).slope
    return {"requests": requests, "resident_mb": samples[-1][1], "mb_per_1000": slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--soak", type=int, default=2000)
    parser.add_argument("--poll-seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with serving("--step-ms", str(STEP_MS)) as server:
        rows["latency"] = latency(server, options.requests)
        rows["polls"] = polls(server, options.poll_seconds)
        rows["overlap"] = overlap(server)
    with serving("--step-ms", "1") as server:
        rows["memory"] = memory(server, options.soak)
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for name, row in rows.items():
        shown = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
        )
        print(f"{name:8} {shown}")
    record = {"benchmark": "server", "machine": facts, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
