"""What `enable_teacache` costs in quality and saves in time, by threshold.

    python benchmarks/bench_step_cache.py [--model-path M] [--size WxH] [--steps N] [--save]

Every prompt is drawn with every step computed, and with steps reused at several thresholds, from
the same seeds; both ways by turns. PSNR and SSIM compare the pictures (of a clip: its frames); the
share of reused steps and the seconds in denoise steps are the engine's own. With random weights,
as without --model-path, the figures say that it works, and nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import RESULTS, Busy, machine
from sgl_diffusion import DiffGenerator
from sgl_diffusion.bench.quality import PROMPTS, psnr, ssim

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.4)


def draw(generator: DiffGenerator, prompt: str, **wish: Any) -> tuple[NDArray[Any], float, float]:
    """The frames, the seconds in its denoise steps, and the share of its steps that was reused."""
    made = generator.generate(prompt, **wish)
    reused = made.reused_steps / made.params.num_inference_steps
    return np.array(made.frames), made.seconds["denoise"], reused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default=None)
    parser.add_argument("--size", default=None, help="WIDTHxHEIGHT; without it the model's")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--device", default=None)
    parser.add_argument("--save", action="store_true", help="keep the results")
    options = parser.parse_args()
    wish: dict[str, Any] = {"num_frames": options.frames, "num_inference_steps": options.steps}
    if options.size is not None:
        wish["width"], wish["height"] = map(int, options.size.split("x"))
    chosen = {} if options.device is None else {"device": options.device}
    begin, other = time.perf_counter(), Busy()
    rows = []
    with DiffGenerator.from_pretrained(options.model_path, **chosen) as generator:
        facts = machine(generator.card.device)
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
        rows = [measure(generator, threshold, options.seeds, wish) for threshold in THRESHOLDS]
        model = generator.card.name
    facts |= {"seconds": round(time.perf_counter() - begin), "other_cores": other.cores()}
    record = {"benchmark": "step_cache", "machine": facts, "model": model, "rows": rows}
    if options.save:
        path = RESULTS / f"{generator.card.device}-{facts['date']}-step-cache.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def measure(
    generator: DiffGenerator, threshold: float, seeds: int, wish: dict[str, Any]
) -> dict[str, Any]:
    """Medians over prompts and seeds."""
    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "reused": [], "speedup": []}
    for prompt in PROMPTS:
        for seed in range(seeds):
            whole, seconds, _ = draw(generator, prompt, seed=seed, **wish)
            asked = {"enable_teacache": True, "teacache_threshold": threshold}
            part, shorter, reused = draw(generator, prompt, seed=seed, **asked, **wish)
            found["psnr"].append(psnr(part, whole))
            found["ssim"].append(ssim(part, whole))
            found["reused"].append(reused)
            found["speedup"].append(seconds / shorter)
    row = {"threshold": threshold, **{key: statistics.median(v) for key, v in found.items()}}
    row["psnr_worst"], row["ssim_worst"] = min(found["psnr"]), min(found["ssim"])
    print("  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()
