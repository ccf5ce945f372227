"""Requests of many clients at a time: our server, the same one job at a time, and plain diffusers.

    python benchmarks/bench_serving.py [--quick] [--repeats 3] [--save]

closed   1, 4, 8 and 16 clients, each with its next request when the last is answered; sizes, steps,
         guidance, seeds and numbers of outputs mixed. Bar: 1.5 times the peer's throughput at 8.
open     requests at random moments, at 0.7 of what the peer can do.
mixed    short requests while one long video after the other is made, and more of them until there
         are two; `video` is what these take. Bar: the p95 of the short ones is at most half of that
         of the server that works on one job at a time, and of the peer's.

streams  closed and mixed once more, for our server: every fourth request is streamed with a partial
         picture, which the peer has not. `stream_queue` is how long these wait until the server
         says that they have begun, `preview` until the picture is there.

With --repeats the bars are medians of whole runs.

The peer is benchmarks/plain_server.py, as one lane of all threads or as a lane per thread:
whichever has more throughput. `pictures_per_cpu_s` counts the processor time of the server and its
workers: it says most where other programs use the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import serving_load as load
from benchmarks.harness import Busy, finish, machine
from benchmarks.processes import serving
from benchmarks.serving_runs import Row, bars, record
from tests.checkpoints.random_wan import build_tiny_wan

CONCURRENCIES = (1, 4, 8, 16)
MODEL = {"heads": 4, "head_dim": 64, "layers": 4}
CLIP = {"size": "128x128", "num_frames": 33, "num_inference_steps": 20}
PEER_SHARE = 0.7
BARS = {"throughput_vs_plain": 1.5, "short_p95_vs_one": 0.5, "short_p95_vs_plain": 0.5}
WARM = 3


@contextmanager
def started(name: str, model: Path) -> Iterator[tuple[str, int]]:
    """ "ours", "one" (job at a time), "plain1" or "plain2" (lanes); warmed up."""
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("plain"):
            lanes = int(name.removeprefix("plain"))
            threads = max(1, torch.get_num_threads() // lanes)
            command = [str(Path(__file__).with_name("plain_server.py"))]
            command += ["--lanes", str(lanes), "--threads", str(threads)]
        else:
            command = ["-m", "sgl_diffusion.cli", "serve", "--port", "0", "--data-dir", folder]
            command += ["--log-level", "warning"]
            command += ["--max-running-jobs", "1"] if name == "one" else []
        with serving(*command, "--model-path", str(model)) as server:
            asyncio.run(load.closed(*server, WARM, WARM, previews=False))
            yield server


def tune(model: Path, requests: int) -> str:
    """Which of its two forms the peer has more throughput in."""
    rates = {}
    for lanes in sorted({1, torch.get_num_threads()}):
        with started(f"plain{lanes}", model) as server:
            made = asyncio.run(load.closed(*server, 8, requests, previews=False))
            rates[f"plain{lanes}"] = made.row()["pictures_per_s"]
    print("peer:", ", ".join(f"{name} {rate:.2f} pictures/s" for name, rate in rates.items()))
    return max(rates, key=lambda name: rates[name])


def measure(name: str, model: Path, requests: int, rate: float | None) -> Iterator[Row]:
    """All loads on one server; without a rate it is 0.7 of what this server can do."""
    with started(name, model) as server:
        for concurrency in CONCURRENCIES:
            made = asyncio.run(load.closed(*server, concurrency, requests, previews=False))
            row = {"load": "closed", "clients": concurrency, **made.row()}
            yield row
            if rate is None and concurrency == 8:
                rate = PEER_SHARE * row["requests"] / made.wall
        assert rate is not None
        made = asyncio.run(load.open_loop(*server, rate, requests, previews=False))
        yield {"load": "open", "rate": rate, **made.row()}
        # Few requests have no p95.
        many = 2 * requests
        made = asyncio.run(load.beside_videos(*server, 4, many, CLIP, previews=False))
        yield {"load": "mixed", "clients": 4, **made.row()}
        if not name.startswith("plain"):
            made = asyncio.run(load.closed(*server, 4, requests, previews=True))
            yield {"load": "streams", "clients": 4, **made.row()}
            made = asyncio.run(load.beside_videos(*server, 4, requests, CLIP, previews=True))
            yield {"load": "mixed streams", "clients": 4, **made.row()}


def run(model: Path, requests: int) -> Row:
    """All loads on all servers, once."""
    begin, other = time.perf_counter(), Busy()
    rows: list[Row] = []
    plain = tune(model, 16)
    rate = None
    for name in (plain, "one", "ours"):
        shown = name.rstrip("0123456789")
        for row in measure(name, model, requests, rate):
            rows.append({"server": shown, **row})
            rate = row.get("rate", rate)
            print("  ".join(f"{key} {_shown(value)}" for key, value in rows[-1].items()))
    facts = {"seconds": round(time.perf_counter() - begin), "other_cores": other.cores()}
    return {"peer": plain, **facts, "rows": rows, "bars": bars(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32, help="of each load")
    parser.add_argument("--quick", action="store_true", help="a third of the requests")
    parser.add_argument("--repeats", type=int, default=1, help="whole runs; medians of the ratios")
    parser.add_argument("--save", action="store_true", help="keep the results")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats is at least 1")
    requests = max(12, options.requests // 3) if options.quick else options.requests
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    begin, other = time.perf_counter(), Busy()
    runs: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_wan(Path(folder) / "model", **MODEL)
        for number in range(options.repeats):
            if options.repeats > 1:
                print(f"run {number + 1} of {options.repeats}")
            runs.append(run(model, requests))
    facts |= {"seconds": round(time.perf_counter() - begin), "other_cores": other.cores()}
    made = record(facts, runs)
    for key, value in made["bars"].items():
        each = [found["bars"][key] for found in runs]
        spread = f"  ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
        print(f"{key:24} {value:.2f}{spread}" + (f"  (bar {BARS[key]:g})" if key in BARS else ""))
    finish(made, options.save)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
