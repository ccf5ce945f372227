"""A real worker without a model: numpy arrays after a few short steps, and failures on demand.

Payload: `steps`, `sleep` and `burn` (processor seconds) per step, `arrays` as [dtype, shape, fill],
`parts` before the final output, `shy` to begin only when no other job is there, `hold` a file
without which the last step is not made, and at step `at` one of: `crash` kills the process, `wrong`
raises, `broken` with it makes cancelling raise too, `stuck` waits until that file exists.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from sgl_diffusion.base.errors import RequestError, SetupError
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import Outbox


class SmallWorker:
    def __init__(self, config: Payload, outbox: Outbox) -> None:
        self._config = config
        self._outbox = outbox
        self._jobs: dict[str, dict[str, Any]] = {}
        self._steps = 0
        self._seen: list[str] = []
        self._fragile = False

    def load(self) -> Payload:
        self._outbox.loading("reading nothing")
        if log := self._config.get("log_loads"):
            with Path(log).open("a") as file:
                print(time.monotonic(), file=file)
        time.sleep(self._config.get("load_sleep", 0.0))
        self._wait_for_a_place()
        refuse = self._config.get("refuse_while")
        if refuse is not None and Path(refuse).exists():
            raise SetupError("The weights are bad.", hint="Get others.", code="bad_weights")
        if "replica" in self._config and self._config["replica"] == self._config.get("bad_replica"):
            raise SetupError("This one cannot.")
        if self._config.get("load_bug"):
            raise ValueError("a secret of the library")
        return {"pid": os.getpid(), **self._config.get("card", {})}

    def submit(self, job_id: str, payload: Payload) -> None:
        self._seen.append(job_id)
        self._jobs[job_id] = {"step": 0, **payload}

    def cancel(self, job_id: str) -> None:
        if self._fragile:
            raise RuntimeError("cannot even cancel")
        self._jobs.pop(job_id, None)

    def control(self, action: str, payload: Payload) -> Payload:
        if action == "wait":
            time.sleep(payload["seconds"])
        here = self._config.get("replica") == payload.get("replica")
        if action == "refuse" and (here or payload.get("everywhere")):
            raise RequestError("Not like this.", code="refused", param="x")
        if action == "bug":
            raise ValueError("a secret of the library")
        if action == "garbage":
            channel: Any = self._outbox
            channel._channel._socket.send(b"\xff" * 100)
        return {"seen": self._seen, "steps": self._steps, "running": len(self._jobs), **payload}

    def step(self) -> bool:
        if not self._jobs:
            return False
        self._steps += 1
        bold = [name for name, job in self._jobs.items() if not job.get("shy")]
        for job_id in bold or list(self._jobs):
            self._advance(job_id, self._jobs[job_id])
        return True

    def running(self) -> int:
        return len(self._jobs)

    def metrics(self) -> list[Metric]:
        return [Metric("steps_total", self._steps), Metric("depth", len(self._jobs), kind="gauge")]

    def _advance(self, job_id: str, job: dict[str, Any]) -> None:
        time.sleep(job.get("sleep", 0.0))
        until = time.process_time() + job.get("burn", 0.0)
        while time.process_time() < until:
            pass
        if job.get("at") == job["step"]:
            self._misbehave(job)
        total = job.get("steps", 1)
        if job["step"] == total - 1 and "hold" in job and not Path(job["hold"]).exists():
            return
        job["step"] += 1
        self._outbox.progress(job_id, job["step"], total, "work")
        if job["step"] <= job.get("parts", 0):
            part = np.full(3, job["step"], np.int32)
            self._outbox.output(job_id, {"part": job["step"]}, [part], final=False)
        if job["step"] >= total:
            del self._jobs[job_id]
            arrays = [np.full(shape, fill, dtype) for dtype, shape, fill in job.get("arrays", [])]
            self._outbox.output(job_id, {"seconds": {"work": 0.5}, "pid": os.getpid()}, arrays)

    def _wait_for_a_place(self) -> None:
        """With `places`, a folder of files, a load takes one away and goes on."""
        while "places" in self._config:
            for place in Path(self._config["places"]).iterdir():
                with contextlib.suppress(FileNotFoundError):  # another may have been quicker
                    place.unlink()
                    return
            time.sleep(0.01)

    def _misbehave(self, job: dict[str, Any]) -> None:
        self._fragile = bool(job.get("broken"))
        if job.get("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        while "stuck" in job and not Path(job["stuck"]).exists():
            time.sleep(0.01)
        if job.get("wrong"):
            raise ValueError("a secret of the library")


def make_worker(config: Payload, outbox: Outbox) -> SmallWorker:
    return SmallWorker(config, outbox)
