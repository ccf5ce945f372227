"""What the server process measures of itself: descriptors, threads, memory, the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

from sgl_diffusion.orchestrator.messages import Metric

_EVERY = 0.25
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Gauges:
    """`lag` is how late the event loop was for an appointment, the worst since the last look."""

    def __init__(self) -> None:
        self._lag = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def metrics(self) -> list[Metric]:
        lag, self._lag = self._lag, 0.0
        values = {
            "open_fds": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "tasks": len(asyncio.all_tasks()),
            "resident_bytes": _resident(),
            "event_loop_lag_seconds": lag,
        }
        return [Metric(name, value, kind="gauge") for name, value in values.items()]

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + _EVERY
            await asyncio.sleep(_EVERY)
            self._lag = max(self._lag, time.monotonic() - due)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
