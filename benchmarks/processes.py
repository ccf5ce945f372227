"""Servers under measurement: processes of their own, and the processor time they use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).parents[1]


def tree_seconds(pid: int) -> float:
    """Processor seconds of a process and of all below it, those that have ended included."""
    parents: dict[int, int] = {}
    spent: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        parents[int(entry.name)] = int(fields[1])
        spent[int(entry.name)] = sum(map(int, fields[11:15]))
    total = 0
    for process in spent:
        above = process
        while above != pid and above in parents:
            above = parents[above]
        total += spent[process] if above == pid else 0
    return total / TICK


@contextmanager
def serving(*command: str, patience: float = 120) -> Iterator[tuple[str, int]]:
    """A Python process that prints its address first and answers /readyz; the address and its id.
    It is ended with all that it started. Threads that wait sleep, as our workers' do."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://"), f"the server did not start: {line!r}"
        address = line.split()[0]
        until = time.monotonic() + patience
        while not _ready(address):
            assert time.monotonic() < until and process.poll() is None, "the server is not ready"
            time.sleep(0.1)
        yield address, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
