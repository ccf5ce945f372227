"""What the coordinator counts and measures about jobs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

from sgl_diffusion.base.errors import BusyError
from sgl_diffusion.orchestrator.gate import GateState
from sgl_diffusion.orchestrator.histogram import Histogram
from sgl_diffusion.orchestrator.job import Asked, Job
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.orchestrator.pace import Pace


class Tally:
    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._refused = 0
        self._waits = Histogram("queue_wait_seconds", "kind")
        self._firsts = Histogram("first_output_seconds", "kind")
        self._runs = Histogram("job_seconds", "kind")
        self._pace = Pace()
        self._cancels: dict[str, float] = {}
        self._drops, self._drop_seconds = 0, 0.0

    def refuse(self, jobs: int) -> BusyError:
        """The error for a job that finds so many ahead, with the time after which to come back."""
        self._refused += 1
        wait, eta = self._pace.retry_after(jobs), self._pace.eta(jobs)
        about = "" if eta is None else f", about {eta:.0f} s"
        return BusyError(
            f"The queue is full: {jobs} jobs ahead{about}.",
            hint=f"Try again in {wait} s, or raise --max-queue.",
            retry_after=wait,
        )

    def began(self, asked: Asked) -> None:
        self._waits.add(time.monotonic() - asked.since, asked.kind)

    def shown(self, asked: Asked) -> None:
        """A job has given the first part of its result."""
        self._firsts.add(time.monotonic() - asked.since, asked.kind)

    def ended(self, outcome: str, job: Job) -> None:
        """Count a job that is over; `outcome` is "completed" or the code of its error."""
        self._outcomes[outcome] += 1
        if outcome == "completed":
            self._runs.add(time.monotonic() - job.asked.since, job.asked.kind)
            self._pace.ended(job.submitted_at)

    def cancelling(self, job_id: str) -> None:
        """The stage was told to let go of a job."""
        self._cancels[job_id] = time.monotonic()

    def dropped(self, job_id: str) -> None:
        """It has."""
        began = self._cancels.pop(job_id, None)
        if began is not None:
            self._drops += 1
            self._drop_seconds += time.monotonic() - began

    def stage_lost(self) -> None:
        """It will answer to nothing any more."""
        self._cancels.clear()

    def metrics(self) -> list[Metric]:
        ended = [
            Metric("jobs_total", count, {"outcome": outcome})
            for outcome, count in self._outcomes.items()
        ]
        return [
            *ended,
            Metric("jobs_refused_total", self._refused),
            *self._waits.metrics(),
            *self._firsts.metrics(),
            *self._runs.metrics(),
            Metric("cancel_latency_seconds_count", self._drops),
            Metric("cancel_latency_seconds_sum", self._drop_seconds),
        ]


def gauges(jobs: Collection[Job], gate: GateState, *, ready: bool) -> list[Metric]:
    """What stands now: jobs that wait and run, and changes that hold jobs back."""
    begun = sum(job.begun for job in jobs)
    values = {
        "jobs_waiting": len(jobs) - begun,
        "jobs_running": begun,
        "jobs_held": gate.held,
        "changes_waiting": gate.changes,
        "worker_ready": int(ready),
    }
    return [Metric(name, value, kind="gauge") for name, value in values.items()]


def restarts(counts: Counter[str]) -> list[Metric]:
    return [
        Metric("worker_restarts_total", count, {"reason": reason})
        for reason, count in counts.items()
    ]
