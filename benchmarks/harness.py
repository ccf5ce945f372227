"""What every benchmark shares: the machine, interleaved medians, the copy limit, and one JSON line.

Peers are timed in turns in one process, so that a noisy neighbour hits all of them alike.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]
RESULTS = Path(__file__).parent / "results"
REPEATS = 11
SPAN = 0.05  # seconds one measurement lasts at least
QUIET = 0.1  # cores that other processes may use in a run that is kept

_others: list[float] = []

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def machine(device: str = "cpu") -> dict[str, Any]:
    """Who ran this, for the result file."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip() or "none"


def keep_freed_memory() -> None:
    """Let malloc keep what it got: else every large result is fresh pages, and faults are timed.

    It holds for the whole process, so every peer gets it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _span(work: Work, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


class _Others:
    """Cores that other processes used meanwhile: on a shared machine they decide the result."""

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *_: object) -> None:
        wall, all_used, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        _others.append(max(0.0, all_used - own) / wall)

    def _now(self) -> tuple[float, float, float]:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = fields[3] + fields[4]
        used = (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), used, time.process_time()


def compare(peers: dict[str, Work], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds a call of each peer, measured in turns."""
    calls = {}
    for name, work in peers.items():
        work()  # compiles, allocates
        calls[name] = max(1, round(SPAN / max(_span(work, 3), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in peers}
    with _Others():
        for turn in range(repeats):
            order = list(peers) if turn % 2 == 0 else list(reversed(peers))
            for name in order:
                times[name].append(_span(peers[name], calls[name]))
    return {name: statistics.median(spans) for name, spans in times.items()}


def copy_of(tensor: torch.Tensor) -> Work:
    """A copy of a tensor into memory that is already there: the limit of a memory-bound op."""
    target = torch.empty_like(tensor)
    return lambda: target.copy_(tensor)


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.json")
    return parser.parse_args()


def report(name: str, rows: list[dict[str, Any]], device: str = "cpu", save: bool = False) -> None:
    """Print a table, keep the result file if asked, and end with one JSON line."""
    facts = machine(device)
    facts["other_cores"] = round(max(_others, default=0.0), 2)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    record = {"benchmark": name, "machine": facts, "rows": rows}
    if save and facts["other_cores"] > QUIET:
        print(f"not saved: other processes used {facts['other_cores']} cores", file=sys.stderr)
    elif save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{device}-{facts['date']}-{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"saved {path.relative_to(RESULTS.parents[1])}", file=sys.stderr)
    print(json.dumps(record))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
