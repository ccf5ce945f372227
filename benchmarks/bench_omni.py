"""Chats and speech of many clients, beside transformers' `generate` behind FastAPI.

    python benchmarks/bench_omni.py [--rounds 2] [--models tiny,middle] [--clients 1,4,16]
        [--what text,speech] [--save]

Both servers get the same greedy requests of the same random model in turns, streamed, at 1, 4 and
16 clients at a time. Text: tokens a second, first token and time between tokens. Speech: seconds of
sound a second, first sound and the whole answer. Bars: at 16 clients twice the peer's throughput;
alone the first sound within 0.35 of the time of the whole answer. Figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import RESULTS, Busy, machine
from tests.checkpoints.tiny_omni import build_qwen3

ROOT = Path(__file__).parents[1]
MODELS = {"tiny": (64, 3), "middle": (512, 8)}
TOKENS, SAID, FRAMES = 32, 12, 32
RATE = 24_000
READY = 300
QUESTIONS = ("a red fox", "the sea and a boat", "a cat in the garden", "a house on the river")

Row = dict[str, Any]


@dataclass
class Seen:
    """One answer: when it was asked for, and when its pieces came."""

    start: float
    texts: list[float] = field(default_factory=list)
    sounds: list[float] = field(default_factory=list)
    samples: int = 0
    tokens: int = TOKENS
    end: float = 0.0


@contextlib.contextmanager
def serving(*command: str) -> Iterator[str]:
    """The address that a server prints first; ready, and gone at the end."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        _until_ready(url)
        yield url
    finally:
        process.terminate()
        process.wait()


def _until_ready(url: str) -> None:
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"{url} is not ready after {READY} s")


def body(number: int, *, speech: bool) -> Row:
    asked = {
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "temperature": 0,
        "seed": 1,
        "stream": True,
        "max_tokens": SAID if speech else TOKENS,
    }
    if speech:
        asked |= {"modalities": ["text", "audio"], "talker_max_new_tokens": FRAMES}
    return asked


async def ask(client: httpx.AsyncClient, number: int, *, speech: bool) -> Seen:
    seen = Seen(time.perf_counter())
    asked = body(number, speech=speech)
    async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            choices = chunk["choices"]
            if usage := chunk.get("usage"):  # an answer may end by itself
                seen.tokens = usage["completion_tokens_details"]["text_tokens"]
            delta = choices[0]["delta"] if choices else {}
            now = time.perf_counter()
            if delta.get("content"):
                seen.texts.append(now)
            if data := (delta.get("audio") or {}).get("data"):
                seen.sounds.append(now)
                seen.samples += len(base64.b64decode(data)) // 2
    seen.end = time.perf_counter()
    return seen


async def load(url: str, clients: int, *, speech: bool) -> tuple[list[Seen], float]:
    """Every client asks one question after the other; all answers, and the time they took."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        each = max(8 // clients, 1)

        async def one(client: int) -> list[Seen]:
            return [await ask(http, client + turn, speech=speech) for turn in range(each)]

        start = time.perf_counter()
        found = await asyncio.gather(*(one(client) for client in range(clients)))
        return [seen for answers in found for seen in answers], time.perf_counter() - start


def summary(answers: list[Seen], wall: float, *, speech: bool) -> Row:
    whole = statistics.median(seen.end - seen.start for seen in answers)
    if speech:
        sound = sum(seen.samples for seen in answers) / RATE
        factors = [(seen.end - seen.start) / (seen.samples / RATE) for seen in answers]
        return {
            "per_second": sound / wall,
            "first_ms": 1000 * statistics.median(s.sounds[0] - s.start for s in answers),
            "whole_ms": 1000 * whole,
            "real_time_factor": statistics.median(factors),
        }
    gaps = [b - a for s in answers for a, b in zip(s.texts, s.texts[1:], strict=False)]
    return {
        "per_second": sum(seen.tokens for seen in answers) / wall,
        "first_ms": 1000 * statistics.median(s.texts[0] - s.start for s in answers),
        "whole_ms": 1000 * whole,
        "between_ms": 1000 * statistics.median(gaps) if gaps else None,
    }


def measure(
    name: str, folder: Path, clients_of: list[int], whats: list[str], rounds: int
) -> list[Row]:
    model = ("--model-path", str(folder))
    ours = ("-m", "sgl_diffusion.cli.omni", "serve", "--port", "0", *model)
    rows = []
    with serving(*ours) as mine, serving("benchmarks/plain_omni.py", *model) as plain:
        for what in whats:
            speech = what == "speech"
            for url in (mine, plain):  # warm
                asyncio.run(load(url, 2, speech=speech))
            for clients in clients_of:
                found: dict[str, list[Row]] = {"ours": [], "plain": []}
                for _ in range(rounds):
                    for server, url in (("ours", mine), ("plain", plain)):
                        answers, wall = asyncio.run(load(url, clients, speech=speech))
                        found[server].append(summary(answers, wall, speech=speech))
                row: Row = {"model": name, "what": what, "clients": clients}
                for server, each in found.items():
                    row[server] = {
                        key: statistics.median(one[key] for one in each)
                        for key in each[0]
                        if each[0][key] is not None
                    }
                row["times"] = row["ours"]["per_second"] / row["plain"]["per_second"]
                row["first_share"] = row["ours"]["first_ms"] / row["ours"]["whole_ms"]
                rows.append(row)
                show(row)
    return rows


def show(row: Row) -> None:
    print(f"{row['model']:7} {row['what']:7} {row['clients']:3} clients", end="")
    for name in ("ours", "plain"):
        figures = "  ".join(f"{key} {value:.4g}" for key, value in row[name].items())
        print(f"\n    {name:6} {figures}", end="")
    share = f"first at {row['first_share']:.2f} of the whole"
    print(f"\n    {row['times']:.2f}x throughput, {share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", default="tiny,middle")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.json")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--what", default="text,speech")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the servers with it
    clients = [int(count) for count in options.clients.split(",")]
    facts, busy = machine(), Busy()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            width, layers = MODELS[name]
            path = build_qwen3(Path(folder) / name, width=width, layers=layers)
            rows += measure(name, path, clients, options.what.split(","), options.rounds)
    # Both servers are other processes, too: on an idle machine it is about the number of cores.
    facts["cores_of_other_processes"] = busy.cores()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    record = {"benchmark": "omni", "machine": facts, "rows": rows}
    if options.save:
        path = RESULTS / f"cpu-{facts['date']}-omni.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"saved {path.name}", file=sys.stderr)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
