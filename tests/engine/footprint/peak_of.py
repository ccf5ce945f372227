"""Run one job in a process of its own and print what it took, and what was foretold.

The peak is that of the resident memory (VmHWM of the process, reset before the job). Run by
test_peaks.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.footprint.trials import measure
from sgl_diffusion.engine.footprint.usage import give_back, peak_since, taken
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench

CPU = torch.device("cpu")


def main(path: str, options: str, wish: str) -> None:
    # What libraries take when they first run is none of the job's.
    pipeline = open_pipeline(EngineOptions(model_path=path, **json.loads(options)), print)
    assert isinstance(pipeline, Pipeline)
    footprint = measure(pipeline)
    bench = Bench(pipeline, overlap=False)
    unit = pipeline.card.size_multiple
    asked = json.loads(wish)
    asked["images"] = tuple(asked.get("images", ()))
    warm = {"width": unit, "height": unit, "num_frames": 1, "num_inference_steps": 1}
    bench.add("warm-up", **{**asked, **warm})
    bench.run()
    give_back()
    base = taken(CPU)
    reset = peak_since(CPU)
    job = bench.add("a", **asked)
    bench.run()
    assert not bench.errors, bench.errors
    found = footprint.job_bytes(job.params)
    record = {
        "peak": reset() - base,
        "foretold": found,
        "base": base,
        "encode": footprint.encode_bytes(job.params),
        "step": footprint.step_bytes(job.params),
        "decode": footprint.decode_bytes(job.params),
        "kept": footprint.kept(job.params),
        "footprint": dataclasses.asdict(footprint),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
