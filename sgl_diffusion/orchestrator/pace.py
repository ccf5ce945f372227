"""How fast a queue moves, and when it is worth coming back to a full one."""

from __future__ import annotations

import math
import random
import time

# Seconds until a refused client may return; clients give up on longer waits.
_SHORTEST, _LONGEST = 1.0, 110.0
_SPREAD = 0.2


class Pace:
    def __init__(self) -> None:
        self._per_job: float | None = None
        self._last_end = 0.0

    def ended(self, submitted_at: float) -> None:
        """A job was completed. Jobs may run side by side: the time between two ends is what the
        queue moves by."""
        now = time.monotonic()
        took = now - max(submitted_at, self._last_end)
        self._per_job = took if self._per_job is None else 0.8 * self._per_job + 0.2 * took
        self._last_end = now

    def eta(self, jobs: float) -> float | None:
        """Seconds for so many jobs; None before the first one ended."""
        return None if self._per_job is None else jobs * self._per_job

    def retry_after(self, jobs: int) -> int:
        """Spread, so that those who were refused together do not return together."""
        eta = self.eta(jobs)
        seconds = _SHORTEST if eta is None else eta
        spread = random.uniform(1 - _SPREAD, 1 + _SPREAD)
        return max(math.ceil(min(seconds, _LONGEST / (1 + _SPREAD)) * spread), 1)
