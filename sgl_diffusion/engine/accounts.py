"""What a runner counts of its units of work: seconds by phase, steps, batches, joins and leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.step_times import StepTimes


class Accounts:
    def __init__(self, counters: Counters, model: str) -> None:
        self._counters = counters
        self.steps = StepTimes(counters, model)

    def spend(self, jobs: Iterable[Job], phase: str, seconds: float, *, beside: bool) -> None:
        """`beside` says that steps went on meanwhile."""
        self._counters.add("phase_seconds_total", seconds, phase=phase)
        self._counters.add("phase_units_total", phase=phase, beside=str(beside).lower())
        for job in jobs:
            job.spend(phase, seconds)

    def step(self, rows: Sequence[Row]) -> None:
        """A step that was done: forwards by batch size; joins and leaves by whether others were,
        or stay, under way."""
        counters = self._counters
        counters.add("denoise_forwards_total", rows=str(len(rows)))
        counters.add("denoise_rows_total", len(rows))
        sizes = len({row.job.size for row in rows})
        if sizes > 1:
            counters.add("packed_forwards_total", sizes=str(sizes))
        fresh = [row for row in rows if row.ran == 1]
        done = [row for row in rows if row.denoised]
        if fresh:
            running = str(len(fresh) < len(rows)).lower()
            counters.add("denoise_joins_total", len(fresh), running=running)
        if done:
            stay = str(len(done) < len(rows)).lower()
            counters.add("denoise_leaves_total", len(done), running=stay)

    def standing(self, jobs: Iterable[Job]) -> None:
        """How many jobs are in each state now."""
        states = {"to_encode": 0, "denoising": 0, "to_decode": 0}
        for job in jobs:
            if not job.encoded:
                states["to_encode"] += 1
            elif job.to_denoise:
                states["denoising"] += 1
            else:
                states["to_decode"] += 1
        for state, count in states.items():
            self._counters.set("engine_jobs", count, state=state)
