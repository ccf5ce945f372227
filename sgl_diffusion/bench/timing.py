"""Time of calls: peers in turns in one process, so that a noisy neighbour hits all alike."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]

REPEATS = 11
SPAN = 0.05  # seconds one measurement lasts at least

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let malloc keep what it got: else every large result is fresh pages, and faults are timed.

    It holds for the whole process, so every peer gets it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class Clock:
    """Times works on one device and keeps how busy other processes were meanwhile.

    A `span` of zero measures single calls, of works that take long. `processor` counts the time of
    this process on the processor: what one thread would take with no other process beside it.
    """

    def __init__(
        self, device: str, repeats: int = REPEATS, span: float = SPAN, processor: bool = False
    ) -> None:
        self.device, self.repeats, self.span = device, repeats, span
        self._now = time.process_time if processor else time.perf_counter
        self.other_cores = 0.0  # used by other processes in the worst comparison

    def compare(self, works: dict[str, Work]) -> dict[str, float]:
        """Median seconds a call of each work, measured in turns."""
        calls = {}
        for name, work in works.items():
            work()  # allocates
            once = self._group(work, 3) if self.span else 1.0
            calls[name] = max(1, round(self.span / max(once, 1e-7)))
        times: dict[str, list[float]] = {name: [] for name in works}
        before = _processor_time()
        for turn in range(self.repeats):
            for name in list(works) if turn % 2 == 0 else list(reversed(works)):
                times[name].append(self._group(works[name], calls[name]))
        wall, every, own = (b - a for a, b in zip(before, _processor_time(), strict=True))
        self.other_cores = max(self.other_cores, (every - own) / wall)
        return {name: statistics.median(spans) for name, spans in times.items()}

    def _group(self, work: Work, calls: int) -> float:
        """Seconds a call: by events on a GPU, whose queue is full while it is timed."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
            milliseconds: float = start.elapsed_time(end)
            return milliseconds / 1e3 / calls
        begin = self._now()
        for _ in range(calls):
            work()
        return (self._now() - begin) / calls


def _processor_time() -> tuple[float, float, float]:
    """Seconds on the clock, of all processors at work, and of this process."""
    stat = Path("/proc/stat")
    used = 0.0
    if stat.exists():
        fields = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
        used = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), used, time.process_time()
