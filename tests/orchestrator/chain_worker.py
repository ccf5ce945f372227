"""Two real stages without a model: the first counts, and hands each number on; the second doubles
them and keeps the sum.

Payload of a job: `steps`, `sleep` per step, `size` of what is handed on, `alone` to hand nothing
on, `back` to hand on one thing that comes back, `hold` a file without which the first stage does
not make its last step; at step `at` the stage `crash` kills its process.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from sgl_diffusion.base.errors import RequestError, SetupError
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import GraphOutbox

FIRST, SECOND = "count", "double"


class _Stage:
    name = ""

    def __init__(self, config: Payload, outbox: GraphOutbox) -> None:
        self._config = config
        self.outbox = outbox
        self.jobs: dict[str, dict[str, Any]] = {}

    def load(self) -> Payload:
        time.sleep(self._config.get("load_sleep", 0.0))
        refuse = self._config.get("refuse_while")
        if refuse is not None and Path(refuse).exists():
            raise SetupError("The weights are bad.", code="bad_weights")
        return {self.name: os.getpid()}

    def submit(self, job_id: str, payload: Payload) -> None:
        self.jobs[job_id] = {"step": 0, **payload}

    def cancel(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)

    def control(self, action: str, payload: Payload) -> Payload:
        raise RequestError("There is none.")

    def running(self) -> int:
        return len(self.jobs)

    def metrics(self) -> list[Metric]:
        return [Metric("inside", len(self.jobs), kind="gauge")]

    def die(self, job: dict[str, Any]) -> None:
        if job.get("crash") == self.name and job["step"] == job.get("at"):
            os.kill(os.getpid(), signal.SIGKILL)


class Counting(_Stage):
    name = FIRST

    def step(self) -> bool:
        for job_id, job in list(self.jobs.items()):
            if job.get("back"):
                self._ask(job_id, job)
                continue
            time.sleep(job.get("sleep", 0.0))
            self.die(job)
            last = job["step"] + 1 >= job["steps"]
            if last and "hold" in job and not Path(job["hold"]).exists():
                continue
            job["step"] += 1
            self.outbox.progress(job_id, job["step"], job["steps"], "count")
            self.outbox.output(job_id, {"said": job["step"]}, [], final=False)
            if not job.get("alone"):
                told = {**job, "last": last}
                values = np.full(job.get("size", 1), job["step"], np.int32)
                self.outbox.hand_on(job_id, SECOND, told, [values])
            if last:
                del self.jobs[job_id]
                self.outbox.output(job_id, {"counted": job["step"]}, [])
        return bool(self.jobs)

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        self.outbox.output(job_id, {"returned": meta["step"]}, [])

    def _ask(self, job_id: str, job: dict[str, Any]) -> None:
        """Hand on and end within one step: what comes back meanwhile is not seen before."""
        self.outbox.hand_on(job_id, SECOND, {"back": True, "step": 1}, [])
        time.sleep(job["sleep"])
        del self.jobs[job_id]
        self.outbox.output(job_id, {"asked": True}, [])


class Doubling(_Stage):
    name = SECOND

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        if meta.get("back"):
            self.outbox.hand_on(job_id, FIRST, meta, [])
            self.outbox.output(job_id, {"seen": True}, [])
            return
        job = self.jobs.setdefault(job_id, {"sum": 0})
        self.die(meta)
        (values,) = arrays
        job["sum"] += 2 * int(values[-1])
        self.outbox.output(job_id, {"doubled": 2 * int(values[0])}, [], final=False)
        if meta["last"]:
            del self.jobs[job_id]
            self.outbox.output(job_id, {"sum": job["sum"]}, [np.array([job["sum"]])])

    def step(self) -> bool:
        return False


def make_first(config: Payload, outbox: GraphOutbox) -> Counting:
    return Counting(config, outbox)


def make_second(config: Payload, outbox: GraphOutbox) -> Doubling:
    return Doubling(config, outbox)
