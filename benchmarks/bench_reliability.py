"""How long the promises of docs/reliability.md take: a real server and worker, a sleeping engine.

    python benchmarks/bench_reliability.py [--repeats 7] [--refused 10000] [--save]

accept      POST /v1/videos until the answer: the row is on the disk by then. `sync` is one write
            and fsync of 4 kB on the same disk, several of which a commit is made of.
cancel      DELETE of a running video until the answer, and until the worker has let go of it.
leave       a client that closes its connection until nothing runs any more.
worker      SIGKILL of the worker until jobs run again.
server      SIGKILL of the server until the next one runs jobs.
stop        SIGTERM of an idle server until its exit.
refused     429 answers per second of processor time, and what 1,000 of them add to the memory.
livez       a probe while videos run.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Busy, finish, machine
from tests.faults.harness import FaultServer
from tests.faults.test_client_faults import idle, leave

Row = dict[str, float]
LONG = {"num_inference_steps": 150}


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def spread(name: str, times: list[float]) -> Row:
    return {f"{name}_ms": statistics.median(times), f"{name}_worst_ms": max(times)}


def accept(server: FaultServer, repeats: int) -> Row:
    def sync() -> None:
        with open(server.data_dir / "sync", "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())

    posts, syncs = [], []
    for _ in range(4 * repeats):
        posts.append(timed(server.make))
        syncs.append(timed(sync))
        server.finished(str(server.http.get("/v1/videos?limit=1").json()["first_id"]))
    (server.data_dir / "sync").unlink()
    return spread("post", posts) | spread("sync", syncs)


def running(server: FaultServer) -> str:
    video = server.make("@slow:0.05", **LONG)
    server.wait_until("runs", lambda: server.state(video)["status"] == "in_progress", 30)
    return video


def cancel(server: FaultServer, repeats: int) -> Row:
    count, total = "cancel_latency_seconds_count", "cancel_latency_seconds_sum"
    before = server.sample(count), server.sample(total)
    times = []
    for _ in range(repeats):
        video = running(server)
        times.append(timed(lambda video=video: server.delete(video)))  # type: ignore[misc]
        idle(server)
    server.wait_until("told", lambda: server.sample(count) == before[0] + repeats, 10)
    let_go = (server.sample(total) - before[1]) / repeats
    return spread("answer", times) | {"let_go_ms": 1000 * let_go, "step_ms": 50.0}


def leaving(server: FaultServer, repeats: int) -> Row:
    body = {"prompt": "@slow:0.05", "size": "32x32", **LONG}
    times = []
    for _ in range(repeats):
        leave(server, "/v1/images/generations", body, 0.3)
        times.append(timed(lambda: idle(server)))
    return spread("idle", times)


def worker(server: FaultServer, repeats: int) -> Row:
    times = []
    for _ in range(min(repeats, 4)):  # the fifth within ten minutes is told as an illness
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_until("lost", lambda: server.sample("worker_ready") == 0, 10)
        times.append(timed(server.wait_worker))
    return spread("again", times)


def refused(server: FaultServer, count: int) -> Row:
    body = {"prompt": "@slow:1", **LONG}
    made = []
    for _ in range(3):  # the worker takes some, and makes room for as many
        while (answer := server.http.post("/v1/videos", json=body)).status_code == 200:
            made.append(answer.json()["id"])
        time.sleep(1.0)
    samples, used = [], _processor_seconds(server)
    for number in range(count):
        assert server.http.post("/v1/videos", json=body).status_code == 429
        if number >= count // 4 and number % 50 == 0:
            samples.append((number / 1000, server.sample("resident_bytes") / 1e6))
    used = _processor_seconds(server) - used
    for video in made:
        server.delete(video)
    idle(server)
    slope = statistics.linear_regression(*zip(*samples, strict=True)).slope
    return {"per_core_second": count / used, "mb_per_1000": slope}


def _processor_seconds(server: FaultServer) -> float:
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def livez(server: FaultServer, repeats: int) -> Row:
    video = running(server)
    times = [
        timed(lambda: server.http.get("/livez").raise_for_status()) for _ in range(50 * repeats)
    ]
    server.delete(video)
    idle(server)
    return spread("probe", times)


def restarts(folder: Path, repeats: int) -> dict[str, Row]:
    kills, stops = [], []
    for _ in range(repeats):
        server = FaultServer(folder).wait_worker()
        server.make("@slow:0.05")
        server.die()
        server.close()
        began = time.perf_counter()
        server = FaultServer(folder).wait_worker()
        kills.append(1000 * (time.perf_counter() - began))
        server.finished(str(server.http.get("/v1/videos?limit=1").json()["first_id"]))
        stops.append(timed(server.terminate))
        server.close()
    return {"server": spread("again", kills), "stop": spread("exit", stops)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--refused", type=int, default=10_000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.json")
    given = parser.parse_args()
    facts, busy, rows = machine(), Busy(), {}

    def add(name: str, row: Row) -> None:
        rows[name] = row
        shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{name:8} {shown}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        server = FaultServer(Path(folder) / "one").wait_worker()
        try:
            add("accept", accept(server, given.repeats))
            add("cancel", cancel(server, given.repeats))
            add("leave", leaving(server, given.repeats))
            add("livez", livez(server, given.repeats))
            add("refused", refused(server, given.refused))
            add("worker", worker(server, given.repeats))
        finally:
            server.close()
        for name, row in restarts(Path(folder) / "two", given.repeats).items():
            add(name, row)
    facts["cores_of_other_processes"] = busy.cores()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    record = {"benchmark": "reliability", "machine": facts, "rows": rows}
    finish(record, given.save)


if __name__ == "__main__":
    main()
