"""A server as `sglang serve` runs it, around an engine that only sleeps and sends pictures.

    python benchmarks/fake_engine.py --data-dir DIR --trace FILE [--step-ms 5] [--tiny]

The worker is a process of its own and sends real arrays; its steps take a set time and no core, so
what a request takes beyond them is the server's. `--tiny` serves the tiny model instead. FILE gets
a JSON line per denoise step, encoded picture and encoded video, with times of one clock.
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

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.params import ModelCard, SamplingDefaults
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import Outbox
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


def fake_app(config: Payload) -> App:
    stage = StageSpec(name="diffusion", entry="benchmarks.fake_engine:FakeWorker", config=config)
    return App(name="fake", stages=(stage,))


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


class Trace:
    """Lines of {"what", "job", "begin", "end"}; processes append to one file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1) if path else None

    def write(self, what: str, job: str, begin: float, **more: float) -> None:
        if self._file is not None:
            entry = {"what": what, "job": job, "begin": begin, "end": time.monotonic(), **more}
            self._file.write(json.dumps(entry) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--trace", default="")
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    from sgl_diffusion.server import image_job, outputs, run

    trace = Trace(options.trace)
    encode_video, encode_image = outputs.encode_video, image_job.encode_image

    def traced_video(clip: Any, path: Path, **how: Any) -> None:
        begin = time.monotonic()
        encode_video(clip, path, **how)
        trace.write("encode", path.name.strip(".").partition(".")[0], begin)

    def traced_image(*what: Any) -> bytes:
        begin, cpu = time.monotonic(), time.thread_time()
        data = encode_image(*what)
        trace.write("picture", "", begin, cpu=time.thread_time() - cpu)
        return data

    outputs.encode_video, image_job.encode_image = traced_video, traced_image
    if not options.tiny:
        config = {"step_ms": options.step_ms, "trace": options.trace}
        run.diffusion_app = lambda *_args, **_options: fake_app(config)  # type: ignore[assignment]
    return run.serve(ServeOptions(port=0, data_dir=options.data_dir, log_level="warning"))


if __name__ == "__main__":
    raise SystemExit(main())
