"""Run one job in a process of its own and print the peak: run by test_peak.py."""

from __future__ import annotations

import json
import sys
from typing import Any

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench
from tests.loader.peak_of import resident


def main(small: str, path: str, options: dict[str, Any]) -> None:
    run(small, {})  # what libraries take when they first run
    before = resident("VmRSS")
    total, offload = run(path, options)
    found = {"peak": resident("VmHWM") - before, "latents": total, "offload": offload}
    print(json.dumps(found))


def run(path: str, options: dict[str, Any]) -> tuple[float, list[str]]:
    pipeline = open_pipeline(EngineOptions(model_path=path, **options), lambda note: None)
    assert isinstance(pipeline, Pipeline)
    bench = Bench(pipeline)
    bench.add("a", width=64, height=64, num_frames=1, num_inference_steps=1)
    bench.run()
    assert not bench.errors, bench.errors
    total = float(sum(row.double().abs().sum() for row in bench.latents["a"]))
    return total, [part.component for part in pipeline.card.offload]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
