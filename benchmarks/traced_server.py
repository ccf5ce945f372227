"""A server as `sglang serve` runs it, with a trace; around an engine that only sleeps, or a model.

    python benchmarks/traced_server.py --data-dir DIR --trace FILE [--step-ms 5 | --model-path M]

The worker is a process of its own and sends real arrays. The steps of the sleeping engine take a
set time and no core, so what a request takes beyond them is the server's. FILE gets a JSON line per
denoise step, engine call, encoded picture and encoded video, with times of one clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sgl_diffusion.apps.diffusion import diffusion_app, make_worker
from sgl_diffusion.base.config import EngineOptions, ServeOptions
from sgl_diffusion.base.params import ModelCard, SamplingDefaults
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import Outbox, Worker
from sgl_diffusion.orchestrator.topology import App, StageSpec

CARD = ModelCard(
    name="fake",
    path="/models/fake",
    family="wan",
    pipeline_class="WanPipeline",
    backend="native",
    tasks=("T2V", "T2I"),
    defaults=SamplingDefaults(
        width=512, height=512, num_inference_steps=4, guidance_scale=5.0, num_frames=17, fps=16
    ),
)


@functools.cache
def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Slopes with grain: a PNG of it has about the size of a photograph's."""
    rows = np.linspace(0, 180, height)[:, None, None]
    columns = np.linspace(0, 60, width)[None, :, None]
    grain = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    return (rows + columns + grain).clip(0, 255).astype(np.uint8)


def fake_app(step_ms: float, trace: str = "") -> App:
    return _app("FakeWorker", {"step_ms": step_ms, "trace": trace})


def model_app(model_path: str, trace: str = "") -> App:
    (stage,) = diffusion_app(EngineOptions(model_path=model_path)).stages
    return _app("traced_worker", {**stage.config, "trace": trace})


def _app(entry: str, config: Payload) -> App:
    stage = StageSpec(name="diffusion", entry=f"benchmarks.traced_server:{entry}", config=config)
    return App(name="measured", stages=(stage,))


class FakeWorker:
    """Steps through one job after the other, like a GPU that is full."""

    def __init__(self, config: Payload, outbox: Outbox) -> None:
        self._outbox = outbox
        self._seconds = config["step_ms"] / 1000
        self._trace = Trace(config["trace"])
        self._jobs: dict[str, dict[str, Any]] = {}
        self._done: dict[str, int] = {}

    def load(self) -> Payload:
        return dataclasses.asdict(CARD)

    def submit(self, job_id: str, payload: Payload) -> None:
        self._jobs[job_id], self._done[job_id] = payload["params"], 0

    def cancel(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)

    def control(self, action: str, payload: Payload) -> Payload:
        return payload

    def step(self) -> bool:
        if not self._jobs:
            return False
        job_id, params = next(iter(self._jobs.items()))
        started = time.monotonic()
        time.sleep(self._seconds)
        self._done[job_id] += 1
        total = params["num_inference_steps"]
        if self._done[job_id] < total:
            self._outbox.progress(job_id, self._done[job_id], total, "denoise")
        else:
            del self._jobs[job_id]
            frame = picture(params["height"], params["width"])
            clip = np.broadcast_to(frame, (params["num_frames"], *frame.shape))
            arrays = [np.ascontiguousarray(clip)] * len(params["seeds"])
            self._outbox.output(job_id, {"seconds": {"denoise": total * self._seconds}}, arrays)
        self._trace.write("step", job_id, started)
        return True

    def running(self) -> int:
        return len(self._jobs)

    def metrics(self) -> list[Metric]:
        return []


def traced_worker(config: Payload, outbox: Outbox) -> Worker:
    """The worker of a real model; the trace tells its denoise steps from what else it does."""
    trace, told, progress = Trace(config["trace"]), [], outbox.progress

    def noted(job_id: str, step: int, total: int, phase: str) -> None:
        if phase == "denoise" and step:
            told.append(job_id)
        progress(job_id, step, total, phase)

    outbox.progress = noted  # type: ignore[method-assign]
    worker = make_worker(config, outbox)
    one_step = worker.step

    def step() -> bool:
        told.clear()
        began = time.monotonic()
        moved = one_step()
        for job_id in told:
            trace.write("step", job_id, began)
        return moved

    worker.step = step  # type: ignore[method-assign]
    return worker


class Trace:
    """Lines of {"what", "job", "begin", "end"}; processes append to one file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1) if path else None

    def write(self, what: str, job: str, begin: float, **more: float) -> None:
        if self._file is not None:
            entry = {"what": what, "job": job, "begin": begin, "end": time.monotonic(), **more}
            self._file.write(json.dumps(entry) + "\n")


def trace_server(trace: Trace) -> None:
    """Wrap what a request does beside HTTP: the engine call and the encoding."""
    from sgl_diffusion.client.client import Client
    from sgl_diffusion.client.types import Generation, GenerationHandle
    from sgl_diffusion.server import image_job, outputs

    encode_video, encode_image = outputs.encode_video, image_job.encode_image
    submit, result = Client.submit, GenerationHandle.result
    begun: dict[str, float] = {}

    async def traced_submit(self: Client, *what: Any, **how: Any) -> GenerationHandle:
        begin = time.monotonic()
        handle = await submit(self, *what, **how)
        begun[handle.id] = begin
        return handle

    async def traced_result(self: GenerationHandle) -> Generation:
        made = await result(self)
        trace.write("engine", self.id, begun.pop(self.id))
        return made

    def traced_video(clip: Any, path: Path, **how: Any) -> None:
        begin = time.monotonic()
        encode_video(clip, path, **how)
        trace.write("encode", path.name.strip(".").partition(".")[0], begin)

    def traced_image(*what: Any) -> bytes:
        begin, cpu = time.monotonic(), time.thread_time()
        data = encode_image(*what)
        trace.write("picture", "", begin, cpu=time.thread_time() - cpu)
        return data

    Client.submit, GenerationHandle.result = traced_submit, traced_result  # type: ignore[method-assign]
    outputs.encode_video, image_job.encode_image = traced_video, traced_image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--trace", default="")
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--model-path")
    given = parser.parse_args()

    from sgl_diffusion.server import run

    trace_server(Trace(given.trace))
    if given.model_path is None:
        app = fake_app(given.step_ms, given.trace)
    else:
        app = model_app(given.model_path, given.trace)
    return run.serve(ServeOptions(port=0, data_dir=given.data_dir, log_level="warning"), app)


if __name__ == "__main__":
    raise SystemExit(main())
