"""A long mixed load on one server, and whether anything grew: `make soak ARGS="--minutes 480"`.

Of the requests a tenth is aborted and a fifth is wrong; a worker is killed every few minutes. Ends
with a report as JSON, and with status 1 if memory, descriptors, threads, tasks or files grew, or a
request was lost. The worker only pretends, so that there are many requests; with `--engine` it is
the real one with the tiny model: pictures and clips of several sizes, lengths and priorities.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.e2e.server import Server
from tests.faults.harness import FaultServer, check

SLOPE = 1e6  # bytes per thousand requests
WORKER_GROWTH = 1.15  # of a worker's memory, after the first third of its life
ABORTED, WRONG = 0.1, 0.2
WARM = 1200  # requests until the answers, rows and threads that are kept are as many as ever
ENGINE_WARM = 200
_BAD: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": ""},
    {"prompt": "x", "size": "0x0"},
    {"prompt": "x", "n": 99},
    {"prompt": "x", "promt": 1},
    {"prompt": "x" * 33_000},
    {"prompt": "x", "num_inference_steps": 10**9},
)


class EngineServer(FaultServer):
    """The real engine in the place of the one that fails as it is told."""

    module = "sgl_diffusion.cli"
    command = ("serve",)

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        Server.__init__(self, data_dir, "--device", "cpu")


@dataclass
class Load:
    """What the clients share: they end at `until`, and not before `least` requests."""

    server: FaultServer
    until: float
    least: int = 0
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def goes_on(self) -> bool:
        return time.monotonic() < self.until or self.requests < self.least

    def count(self, outcome: str) -> None:
        with self.lock:
            self.requests += 1
            self.outcomes[outcome] += 1


def client(load: Load, seed: int) -> None:
    chance = random.Random(seed)
    with httpx.Client(base_url=load.server.url, timeout=60) as http:
        while load.goes_on():
            try:
                load.count(_one(http, chance, engine=isinstance(load.server, EngineServer)))
            except httpx.TimeoutException:
                load.count("no answer in time")
            except httpx.TransportError:
                load.count("cut off")


def _one(http: httpx.Client, chance: random.Random, *, engine: bool) -> str:
    lot = chance.random()
    path = chance.choice(("/v1/images/generations", "/v1/videos"))
    if lot < ABORTED:
        slow = {"prompt": "@slow:0.02", "size": "32x32", "num_inference_steps": 100}
        try:
            http.post("/v1/images/generations", json=slow, timeout=0.05)
        except httpx.TimeoutException:
            return "aborted"
        return "not aborted"
    if lot < ABORTED + WRONG:
        return f"wrong {http.post(path, json=chance.choice(_BAD)).status_code}"
    body: dict[str, Any] = {"prompt": "soak", "size": "32x32", "seed": chance.randrange(1000)}
    if engine:
        body |= {
            "size": chance.choice(("32x32", "48x32", "64x64")),
            "num_inference_steps": chance.choice((2, 4, 12)),
            "guidance_scale": chance.choice((1.0, 5.0)),
            "priority": chance.randrange(10),
            "n": chance.choice((1, 1, 2)),
        }
    if path.endswith("generations"):
        form = chance.choice(("url", "b64_json"))
        answer = http.post(path, json={**body, "response_format": form})
        if form == "url" and answer.status_code == 200:
            made = answer.json()
            http.get(made["data"][0]["url"])
            http.delete(f"/v1/images/{made['id']}")
        return f"image {answer.status_code}"
    answer = http.post(path, json={**body, "num_frames": 5})
    if answer.status_code != 200:
        return f"video {answer.status_code}"
    video = answer.json()
    while video["status"] in ("queued", "in_progress"):
        time.sleep(0.02)
        video = http.get(f"/v1/videos/{video['id']}").json()
    http.get(f"/v1/videos/{video['id']}/content")
    http.delete(f"/v1/videos/{video['id']}")
    return f"video {video['status']}"


@dataclass(frozen=True)
class Sample:
    seconds: float
    requests: int
    resident: float
    fds: float
    threads: float
    tasks: float
    files: int
    worker: float  # what the present one holds
    died: float  # how many there were before it


def sample(load: Load, began: float) -> Sample:
    found = load.server.metrics()
    names = ("resident_bytes", "open_fds", "threads", "tasks")
    files = sum(1 for path in load.server.data_dir.rglob("*") if path.is_file())
    return Sample(
        round(time.monotonic() - began, 1),
        load.requests,
        *(found[f"sgld_{name}"] for name in names),
        files=files,
        worker=found.get("sgld_worker_resident_bytes", 0.0),
        died=sum(count for name, count in found.items() if "worker_restarts_total" in name),
    )


def slope(samples: list[Sample]) -> float:
    """Bytes per thousand requests."""
    requests = [sample.requests for sample in samples]
    return float(np.polyfit(requests, [sample.resident for sample in samples], 1)[0] * 1000)


def worker_growth(samples: list[Sample]) -> float:
    """The largest growth of a worker, from the end of the first third of its life on."""
    lives: dict[float, list[float]] = {}
    for sample in samples:
        if sample.worker:
            lives.setdefault(sample.died, []).append(sample.worker)
    long = [life for life in lives.values() if len(life) >= 12]
    return max((max(life[-4:]) / max(life[: len(life) // 3]) for life in long), default=1.0)


def lost(outcomes: Counter[str]) -> int:
    """Requests that were in order, and did not get what they asked for."""
    fine = ("image 200", "video completed", "aborted", "not aborted")
    return sum(n for what, n in outcomes.items() if what not in fine and "wrong 4" not in what)


def soak(server: FaultServer, seconds: float, clients: int, kill_every: float) -> dict[str, Any]:
    began = time.monotonic()
    # What is there before the first picture is no measure: imports, pools and caches come with it.
    engine = isinstance(server, EngineServer)
    warm = Load(server, began, ENGINE_WARM if engine else WARM)
    _drive(warm, clients, lambda: time.sleep(0.2))
    load = Load(server, time.monotonic() + seconds)
    before = _settled(load, began)
    samples: list[Sample] = []
    next_sample, next_kill = time.monotonic(), time.monotonic() + kill_every

    def watch() -> None:
        nonlocal next_sample, next_kill
        if time.monotonic() >= next_kill:
            next_kill += kill_every
            with suppress(IndexError, ProcessLookupError):
                os.kill(server.workers()[0], 9)
        if time.monotonic() >= next_sample:
            next_sample += max(seconds / 200, 0.5)
            samples.append(sample(load, began))
        time.sleep(0.1)

    _drive(load, clients, watch)
    after = _settled(load, began)
    check(server, pretended=not engine)
    grown = {
        name: getattr(after, name) - getattr(before, name) for name in ("fds", "tasks", "files")
    }
    grown["threads"] = after.threads - _pooled(before, samples)
    found, workers, missing = slope(samples), worker_growth(samples), lost(load.outcomes)
    flat = found < SLOPE and workers < WORKER_GROWTH
    return {
        "passed": flat and missing == 0 and all(count <= 0 for count in grown.values()),
        "engine": engine,
        "seconds": round(seconds),
        "requests": load.requests,
        "outcomes": dict(sorted(load.outcomes.items())),
        "lost": missing,
        "workers_killed": round(samples[-1].died - samples[0].died),
        "worker_growth": round(workers, 3),
        "rss_bytes_per_1000_requests": round(found),
        "warm_requests": warm.requests,
        "rss_mb": [round(one.resident / 1e6, 1) for one in samples[:: max(len(samples) // 12, 1)]],
        "grown": grown,
        "machine": f"{platform.machine()} {os.cpu_count()} cpus",
        "date": time.strftime("%Y-%m-%d"),
    }


def _pooled(before: Sample, samples: list[Sample]) -> float:
    """Threads when every pool is full: each has a bound, and takes a thread when it first needs it.
    Two thirds of the load are left to see more come."""
    return max(one.threads for one in (before, *samples[: len(samples) // 3]))


def _drive(load: Load, clients: int, watch: Any) -> None:
    threads = [threading.Thread(target=client, args=(load, number)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        watch()


def _settled(load: Load, began: float) -> Sample:
    """When nothing runs and unused connections are closed."""
    time.sleep(6.0)
    load.server.wait_worker()
    return sample(load, began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--engine", action="store_true", help="the real one, with the tiny model")
    parser.add_argument("--kill-every", type=float, default=300.0, help="seconds")
    parser.add_argument("--report", type=Path, default=None)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        server = EngineServer(data) if chosen.engine else FaultServer(data)
        try:
            server.wait_worker()
            report = soak(server, 60 * chosen.minutes, chosen.clients, chosen.kill_every)
        finally:
            server.close()
    text = json.dumps(report, indent=2)
    if chosen.report is not None:
        chosen.report.write_text(text + "\n")
    print(text)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
