"""A worker without a model that fails on demand: twenty steps of a little sleep and numpy.

The prompt says what goes wrong, and at which step: `@abort:3` `@kill:3` `@exit:3` `@hang:3`
`@stop:3` `@raise:3` `@memory:3` `@oom:3` `@hoard:3` (takes 600 MB). `@slow:0.1` is the length of
each step in seconds, and `@hold:3` makes that step only when the file `hold` of the data folder is
gone.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from pathlib import Path

import msgspec
import numpy as np

from sgl_diffusion.base.errors import EngineError, OutOfMemoryError
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import Outbox

SECRET = "a secret of the library"
_COMMAND = re.compile(r"@(\w+):([\d.]+)")


def card(path: str) -> ModelCard:
    return ModelCard(
        name=path,
        path=path,
        family="fake",
        pipeline_class="FakePipeline",
        backend="native",
        tasks=("T2V", "T2I"),
        defaults=SamplingDefaults(
            width=32, height=32, num_inference_steps=20, guidance_scale=1.0, num_frames=5, fps=8
        ),
    )


def brightness(seed: int) -> int:
    """Every pixel of a clip: what a test finds in the file."""
    return 30 + seed % 200


@dataclasses.dataclass
class _Job:
    params: ResolvedParams
    commands: dict[str, float]
    step: int = 0


class FakeEngine:
    def __init__(self, config: Payload, outbox: Outbox) -> None:
        self._config = config
        self._outbox = outbox
        self._jobs: dict[str, _Job] = {}
        self._steps = 0
        self._hoard = np.ones(0)

    def load(self) -> Payload:
        if (marker := self._config.get("broken_while")) and Path(marker).exists():
            raise EngineError("The weights are bad.", hint="Get others.")
        described: Payload = dataclasses.asdict(card(self._config["model"]))
        return described

    def submit(self, job_id: str, payload: Payload) -> None:
        params = msgspec.convert(payload["params"], ResolvedParams)
        found = {name: float(value) for name, value in _COMMAND.findall(params.prompt)}
        self._jobs[job_id] = _Job(params, found)

    def cancel(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)

    def control(self, action: str, payload: Payload) -> Payload:
        return {}

    def step(self) -> bool:
        if not self._jobs:
            return False
        self._steps += 1
        time.sleep(max(job.commands.get("slow", 0.002) for job in self._jobs.values()))
        for job_id, job in list(self._jobs.items()):
            self._advance(job_id, job)
        return True

    def running(self) -> int:
        return len(self._jobs)

    def metrics(self) -> list[Metric]:
        return [Metric("steps_total", self._steps)]

    def _advance(self, job_id: str, job: _Job) -> None:
        for name, at in job.commands.items():
            if name not in ("slow", "hold") and at == job.step:
                self._fail(name, job_id)
        if job_id not in self._jobs or self._held(job):
            return
        np.dot(np.ones((64, 64)), np.ones((64, 64)))
        job.step += 1
        total = job.params.num_inference_steps
        self._outbox.progress(job_id, job.step, total, "denoise")
        if job.step >= total:
            del self._jobs[job_id]
            shape = (job.params.num_frames, job.params.height, job.params.width, 3)
            clips = [np.full(shape, brightness(seed), np.uint8) for seed in job.params.seeds]
            self._outbox.output(job_id, {"seconds": {"denoise": 0.1}}, clips)

    def _held(self, job: _Job) -> bool:
        return job.commands.get("hold") == job.step and Path(self._config["hold_while"]).exists()

    def _fail(self, name: str, job_id: str) -> None:
        match name:
            case "abort":
                os.abort()
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(0)
            case "hang":
                time.sleep(3600)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise ValueError(SECRET)
            case "memory":
                raise MemoryError(SECRET)
            case "hoard":
                self._hoard = np.ones(75_000_000)
            case "oom":
                del self._jobs[job_id]
                error = OutOfMemoryError(
                    "It needs 31.4 GB, 23.6 GB are free.", hint="Ask for less."
                )
                self._outbox.failed(job_id, error)


def make_worker(config: Payload, outbox: Outbox) -> FakeEngine:
    return FakeEngine(config, outbox)
