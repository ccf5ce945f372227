"""Start-up: `sglang --help`, `sglang serve` to a listening socket and to a first image.

    python benchmarks/bench_startup.py [--repeats 5]

The peer of the help text is a bare `python -c pass`; the peer of the first image is the import of
torch, transformers and diffusers' Wan classes, which no server of such a model can avoid.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

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


def serve(data: str) -> dict[str, float]:
    """One start of the server: seconds to the socket, to ready, and to the first image."""
    start = time.perf_counter()
    command = [*SGLANG, "serve", "--port", "0", "--data-dir", data]
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
                post(f"{url}/v1/images/generations")
                found["image"] = time.perf_counter() - start
                break
    finally:
        server.terminate()
        server.wait(30)
    assert len(found) == 3, f"the server did not become ready: {found}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as data:
        add("first start ever: image", serve(data)["image"])
        for _ in range(options.repeats):
            add("python -c pass", seconds([sys.executable, "-c", "pass"]))
            add("sglang --help", seconds([*SGLANG, "--help"]))
            add("bare imports", seconds([sys.executable, "-c", IMPORTS]))
            for name, value in serve(data).items():
                add(f"serve: {name}", value)
    medians = {name: round(statistics.median(values), 3) for name, values in rows.items()}
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for name, value in medians.items():
        print(f"{name:<28} {value:8.3f} s")
    report = json.dumps({"bench": "startup", "date": time.strftime("%Y-%m-%d"), "seconds": medians})
    if options.out:
        options.out.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
