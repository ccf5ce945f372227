"""How long a stage has said nothing, and whether that is too long."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from pathlib import Path

from sgl_diffusion.orchestrator.limits import Limits

_TICK = os.sysconf("SC_CLK_TCK")
_COMPUTES = 0.1  # of a core, at least, by one that works: others may have most of the machine


class Silence:
    """Of one run of a stage. It hears from it by `heard` and `beat`, and of the time by `grows`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.seconds = 0.0
        self._just_heard = True
        self._spent: float | None = None  # by its process, when it was heard last
        self._running = 0
        self._beat_at = 0.0
        self._gaps: deque[float] = deque(maxlen=64)

    def heard(self) -> None:
        self.seconds, self._just_heard = 0.0, True

    def beat(self, running: int) -> None:
        now = time.monotonic()
        if self._running and running:
            self._gaps.append(now - self._beat_at)
        self._running, self._beat_at = running, now

    def grows(self, seconds: float, pid: int | None) -> None:
        if self._just_heard:
            self._just_heard, self._spent = False, processor_seconds(pid)
        self.seconds += seconds

    def too_long(self, pid: int | None, *, ready: bool, on_cpu: bool) -> bool:
        if not ready:
            return self.seconds > self._limits.load_silence
        step = statistics.median(self._gaps) if self._gaps else 0.0
        if self.seconds <= max(self._limits.silence, 3 * step):
            return False
        # One call may take minutes on a CPU: the attention of a long clip. On a GPU the host only
        # waits meanwhile, hung or not, and may use a core for it.
        patience = max(self._limits.load_silence, 3 * step)
        return not (on_cpu and self._computes(pid)) or self.seconds > patience

    def _computes(self, pid: int | None) -> bool:
        spent = processor_seconds(pid)
        if spent is None or self._spent is None:
            return False
        return spent - self._spent > _COMPUTES * self.seconds


def processor_seconds(pid: int | None) -> float | None:
    """What a process has computed; None where nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICK
