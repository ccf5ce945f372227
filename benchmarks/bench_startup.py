"""Start-up: `sglang --help`, `sglang serve` to a listening socket, to ready and to a first image.

    python benchmarks/bench_startup.py [--repeats 5] [--layers 12] [--folder DIR] [--save]

The peer of the help text is a bare `python -c pass`; the peer of the first image is the import of
torch, transformers and diffusers' Wan classes, which no server of such a model can avoid.

A transformer of `--layers` blocks of Wan 1.3B's width (12: 1.4 GB in fp32), not in the page cache,
is ready at best after those imports and one reading of its file, at the rate at which threads read
it past the cache here. Bar: 1.2 times that.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_load import forget, past_the_cache
from benchmarks.harness import Busy, finish, machine
from tests.checkpoints.random_wan import build_tiny_wan

BAR = 1.2
IMPORTS = (
    "import torch; from diffusers import AutoencoderKLWan; "
    "from transformers import UMT5EncoderModel"
)
SGLANG = [sys.executable, "-m", "sgl_diffusion.cli"]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def post(url: str) -> bytes:
    body = json.dumps({"prompt": "a red circle", "size": "256x256"}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def serve(data: str, *flags: str, image: bool = True) -> dict[str, float]:
    """One start of the server: seconds to the socket, to ready, and to the first image."""
    start = time.perf_counter()
    command = [*SGLANG, "serve", "--port", "0", "--data-dir", data, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    found: dict[str, float] = {}
    url = ""
    try:
        for line in server.stdout:
            if match := re.search(r"http://[\d.]+:\d+", line):
                url = url or match.group()
                found.setdefault("socket", time.perf_counter() - start)
            if "ready in" in line.lower():
                found["ready"] = time.perf_counter() - start
                if image:
                    post(f"{url}/v1/images/generations")
                    found["image"] = time.perf_counter() - start
                break
    finally:
        server.terminate()
        server.wait(30)
    assert len(found) == 2 + image, f"the server did not become ready: {found}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="on the disk that models are on")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    busy = Busy()
    with tempfile.TemporaryDirectory(dir=options.folder) as data:
        large = build_tiny_wan(Path(data) / "large", heads=12, head_dim=128, layers=options.layers)
        weights = sorted((large / "transformer").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in weights)
        flags = ("--model-path", str(large), "--dit-precision", "fp32", "--device", "cpu")
        add("first start ever: image", serve(data)["image"])
        serve(data, *flags, image=False)  # its memory is counted once
        for _ in range(options.repeats):
            add("python -c pass", seconds([sys.executable, "-c", "pass"]))
            add("sglang --help", seconds([*SGLANG, "--help"]))
            add("bare imports", seconds([sys.executable, "-c", IMPORTS]))
            for name, value in serve(data).items():
                add(f"serve: {name}", value)
            begin = time.perf_counter()
            for file in weights:
                forget(file)
                past_the_cache(file)
            add("large: read", time.perf_counter() - begin)
            for file in weights:
                forget(file)
            add("large: ready", serve(data, *flags, image=False)["ready"])
    medians = {name: round(statistics.median(values), 3) for name, values in rows.items()}
    for name, value in medians.items():
        print(f"{name:<28} {value:8.3f} s")
    reached = medians["large: ready"] / (medians["bare imports"] + medians["large: read"])
    print(
        f"large, {size / 1e9:.2f} GB: {reached:.2f} of imports and reading, bar {BAR}: "
        f"{'met' if reached <= BAR else 'missed'}"
    )
    record = {
        "benchmark": "startup",
        "machine": machine(),
        "bytes": size,
        "busy_cores": busy.cores(),
        "seconds": medians,
        "reached": {"large: ready": round(reached, 3)},
        "bars": {"large: ready": BAR},
    }
    finish(record, options.save)


if __name__ == "__main__":
    main()
