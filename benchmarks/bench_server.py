"""The shell around the engine: what HTTP adds, polls, encoding beside denoising, memory.

    python benchmarks/bench_server.py [--requests 200] [--soak 2000] [--save]

latency   a 512x512 PNG as b64_json, in turns with a bare engine call. What is left of a request
          without its engine call and its PNG encoding is the HTTP path: on the clock, from the
          first byte sent to the last byte read, and in processor time of the server and of the
          client. Bar: 5 ms in the median.
polls     status polls over kept-alive connections while videos run. Bar: 1,000 a second and core.
overlap   denoise steps of the next video while the last one is encoded. Bar: none is longer.
memory    resident memory of the server over many image requests. Bar: 1 MB per 1,000.

All of it around an engine that sleeps; the first three with the tiny model, too.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Busy, finish, machine
from benchmarks.server_process import Server, serving
from benchmarks.traced_server import fake_app, model_app
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.client.client import Client
from sgl_diffusion.orchestrator.topology import App
from tests.checkpoints.random_wan import build_tiny_wan

STEP_MS = 5.0
WARM = 10
BODY = {
    "prompt": "a red fox",
    "size": "512x512",
    "num_inference_steps": 4,
    "response_format": "b64_json",
}

Row = dict[str, Any]


def latency(server: Server, app: App, requests: int) -> Row:
    """Milliseconds of a request and of its parts, and of a bare engine call before each."""
    whole, bare = [], []
    spent = {"server": 0.0, "client": 0.0, "engine": 0.0}

    async def run() -> None:
        client = Client(app)
        await client.start()
        await client.ready()
        wish = SamplingParams(prompt="a red fox", width=512, height=512, num_inference_steps=4)
        params = client.resolve(wish, video=False)
        for number in range(requests + WARM):
            if number == WARM:
                spent.update(dict.fromkeys(spent, 0.0))
            start, used = time.perf_counter(), time.process_time()
            await (await client.submit(params)).result()
            bare.append(time.perf_counter() - start)
            spent["engine"] += time.process_time() - used
            before = server.processor_seconds()
            start, used = time.perf_counter(), time.process_time()
            status, _ = server.call("POST", "/v1/images/generations", BODY)
            whole.append(time.perf_counter() - start)
            spent["client"] += time.process_time() - used
            spent["server"] += server.processor_seconds() - before
            assert status == 200
        await client.stop()

    asyncio.run(run())
    engines = [event["end"] - event["begin"] for event in server.events("engine")][WARM:]
    pictures = server.events("picture")[WARM:]
    pngs = [event["end"] - event["begin"] for event in pictures]
    rows = list(zip(whole[WARM:], engines, pngs, strict=True))
    added = [1000 * (request - engine - png) for request, engine, png in rows]
    cuts = statistics.quantiles(added, n=20)
    per_request = {name: 1000 * seconds / requests for name, seconds in spent.items()}
    png_cpu = 1000 * statistics.mean(event["cpu"] for event in pictures)
    return {
        "requests": requests,
        "http_ms": 1000 * statistics.median(whole[WARM:]),
        "bare_engine_ms": 1000 * statistics.median(bare[WARM:]),
        "engine_ms": 1000 * statistics.median(engines),
        "png_ms": 1000 * statistics.median(pngs),
        "added_ms": statistics.median(added),
        "added_p10_ms": cuts[1],
        "added_p95_ms": cuts[18],
        "added_server_cpu_ms": per_request["server"] - per_request["engine"] - png_cpu,
        "client_cpu_ms": per_request["client"],
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


def polls(server: Server, seconds: float, connections: int = 8) -> Row:
    """Polls of a running, a waiting and a finished video."""
    done = server.video(num_inference_steps=1, num_frames=1, size="64x64")
    server.wait(done, "completed")
    ids = [done, *(server.video(num_inference_steps=200) for _ in range(40))]
    server.wait(ids[1], "in_progress")

    async def run() -> int:
        until = time.perf_counter() + seconds
        paths = [f"/v1/videos/{ids[i % 3]}" for i in range(connections)]
        return sum(await asyncio.gather(*(_poll(server.address, p, until) for p in paths)))

    before, start = server.processor_seconds(), time.perf_counter()
    count = asyncio.run(run())
    wall, cpu = time.perf_counter() - start, server.processor_seconds() - before
    for video in ids:
        server.made("DELETE", f"/v1/videos/{video}")
    return {"per_second": count / wall, "per_core_second": count / cpu, "cpu_us": 1e6 * cpu / count}


def overlap(server: Server, size: dict[str, Any], pairs: int = 6) -> Row:
    """Steps of a video while the one before it is encoded, and after that: milliseconds."""
    during, alone, spans = [], [], []
    for _ in range(pairs):
        first = server.video(**size, num_inference_steps=4)
        second = server.video(**size, num_inference_steps=60)
        server.wait(second, "completed")
        steps = {
            job: sorted((e["begin"], e["end"]) for e in server.events("step") if e["job"] == job)
            for job in (first, second)
        }
        ((start, stop),) = [
            (e["begin"], e["end"]) for e in server.events("encode") if e["job"] == first
        ]
        spans.append(stop - start)
        for begin, end in steps[second]:
            if begin >= steps[first][-1][1]:  # before that they can be one batch
                inside = begin < stop and end > start
                (during if inside else alone).append(1000 * (end - begin))
    return {
        "encode_s": statistics.median(spans),
        "steps_during": len(during),
        "step_during_ms": statistics.median(during) if during else None,
        "step_alone_ms": statistics.median(alone),
    }


def memory(server: Server, requests: int) -> Row:
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


def measure(requests: int, soak: int, seconds: float) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    with serving("--step-ms", str(STEP_MS)) as server:
        rows["latency"] = latency(server, fake_app(STEP_MS), requests)
        rows["polls"] = polls(server, seconds)
        rows["overlap"] = overlap(server, {"size": "512x512", "num_frames": 33})
    with tempfile.TemporaryDirectory() as folder:
        model = str(build_tiny_wan(Path(folder) / "tiny"))
        with serving("--model-path", model) as server:
            rows["latency, tiny model"] = latency(server, model_app(model), requests // 4)
            rows["polls, tiny model"] = polls(server, seconds)
            rows["overlap, tiny model"] = overlap(server, {"size": "128x128", "num_frames": 33})
    with serving("--step-ms", "1") as server:
        rows["memory"] = memory(server, soak)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--soak", type=int, default=2000)
    parser.add_argument("--poll-seconds", type=float, default=5.0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.json")
    options = parser.parse_args()
    facts, busy = machine(), Busy()
    rows = measure(options.requests, options.soak, options.poll_seconds)
    # Our own servers and workers are other processes, too: on an idle machine it is about 1.
    facts["cores_of_other_processes"] = busy.cores()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for name, row in rows.items():
        shown = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
        )
        print(f"{name:20} {shown}")
    record = {"benchmark": "server", "machine": facts, "rows": rows}
    finish(record, options.save)


if __name__ == "__main__":
    main()
