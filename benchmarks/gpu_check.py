"""The GPU check in parts of a few minutes: build, correctness, benchmarks against peers.

    python benchmarks/gpu_check.py build|correct|norms|attention|lora|denoise|e2e [--save]

Every part can run by itself and builds what is missing first. Peers are timed in turns in one
process over several sets of random inputs; each part prints a table and one JSON line, and with
--save writes benchmarks/results/<gpu>-<date>-<part>.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PARTS = ("build", "correct", "norms", "attention", "lora", "denoise", "e2e")
SANITIZER_SECONDS = 150
SETS = 3  # input sets in rotation, so that the cache does not serve the next call

Row = dict[str, Any]
Peers = dict[str, Callable[[int], Any]]  # name -> a call on one of the input sets


def build() -> list[Row]:
    """Compiles and installs the package in place, unless that has been done."""
    start = time.perf_counter()
    installed = importlib.util.find_spec("sgl_diffusion.kernels") is not None
    if not (installed and (ROOT / "sgl_diffusion" / "_lib" / "libsgld.so").exists()):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation"]
        subprocess.run([*command, "--no-deps", "-e", ROOT], check=True)
    code = (
        "import torch; from sgl_diffusion.ops import library, triton_impl; "
        "import sgl_diffusion.kernels; "
        "print(library.without_cuda() or triton_impl.absent() or 'ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stdout + done.stderr
    return [{"step": "build", "seconds": time.perf_counter() - start}]


def correct() -> list[Row]:
    """tests/gpu, then its smallest shapes again under compute-sanitizer where that works."""
    tests = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-m", "gpu", ROOT / "tests/gpu"]
    start = time.perf_counter()
    done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    rows = [_step("tests/gpu", start, done.returncode == 0, done.stdout)]
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [*rows, {"step": "compute-sanitizer", "seconds": 0.0, "result": "not installed"}]
    start = time.perf_counter()
    small = [tool, "--error-exitcode", "9", *tests, "-x", "-k", "shape0 and not lora"]
    try:
        done = subprocess.run(
            small, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [*rows, {"step": "compute-sanitizer", "seconds": 150.0, "result": "timed out"}]
    return [*rows, _step("compute-sanitizer", start, done.returncode == 0, done.stdout)]


def _step(name: str, start: float, passed: bool, text: str) -> Row:
    lines = text.strip().splitlines() or ["no output"]
    result = "passed" if passed else "FAILED"
    return {
        "step": name,
        "seconds": time.perf_counter() - start,
        "result": f"{result}: {lines[-1]}",
    }


# ---- timing ----


def compare(peers: Peers, repeats: int = 9, span_ms: float = 20.0) -> dict[str, float]:
    """Median milliseconds a call, by events around groups of calls, peers in turns."""
    import torch

    def group(work: Callable[[int], Any], calls: int) -> float:
        if not torch.cuda.is_available():
            begin = time.perf_counter()
            for i in range(calls):
                work(i % SETS)
            return (time.perf_counter() - begin) * 1e3 / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(calls):
            work(i % SETS)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    calls = {}
    for name, work in peers.items():
        for i in range(SETS):
            work(i)  # compiles, allocates
        calls[name] = max(SETS, round(span_ms / max(group(work, SETS), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(repeats):
        for name in list(peers) if turn % 2 == 0 else list(reversed(peers)):
            times[name].append(group(peers[name], calls[name]))
    return {name: statistics.median(spans) for name, spans in times.items()}


def copy_rate() -> float:
    """GB/s of a large copy on this device, bytes read plus bytes written."""
    import torch

    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / 1e6 / compare({"copy": lambda _: target.copy_(source)})["copy"]


def rows_of(op: str, shape: str, peers: Peers, amount: float, unit: str, limit: float) -> list[Row]:
    """One row a peer; `amount` is in GB or TFLOP a call, `limit` the measured ceiling a second."""
    rows: list[Row] = []
    for name, work in list(peers.items()):
        try:
            work(0)
        except Exception as error:  # a peer that this build of torch lacks must not end the part
            del peers[name]
            rows.append({"op": op, "shape": shape, "by": name, "result": repr(error)[:100]})
    times = compare(peers)
    return rows + [
        {
            "op": op,
            "shape": shape,
            "by": name,
            "ms": ms,
            "rate": amount / ms * 1e3,
            "unit": unit,
            "share": amount / ms * 1e3 / limit,
            "vs": {other: times[other] / ms for other in times if other != name},
        }
        for name, ms in times.items()
    ]


def report(part: str, rows: list[Row], save: bool) -> None:
    import torch

    from benchmarks import harness

    facts = harness.machine("cuda") | {"cuda": torch.version.cuda}
    if importlib.util.find_spec("triton"):
        facts["triton"] = importlib.import_module("triton").__version__
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for row in rows:
        print("  ".join(_cell(value) for value in row.values()))
    record = {"benchmark": part, "machine": facts, "rows": rows}
    harness.finish(record, save, facts["gpu"].lower().replace(" ", "-"))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{other} {ratio:.2f}x" for other, ratio in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.json")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    rows = build()
    importlib.invalidate_caches()
    if options.part == "correct":
        rows = correct()
    elif options.part != "build":
        name = {"denoise": "bench_denoise", "e2e": "gpu_engine"}.get(options.part, "gpu_cases")
        cases = importlib.import_module(f"benchmarks.{name}")
        with torch.inference_mode():
            rows = getattr(cases, options.part)()
    report(options.part, rows, options.save)
    return 1 if any("FAILED" in str(row.get("result", "")) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
