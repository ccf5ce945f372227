"""What clients choose does not fill the metrics."""

from __future__ import annotations

import dataclasses

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.step_times import MOST_SIZES, OTHER, StepTimes


def test_sizes_beyond_the_first_are_one_series() -> None:
    counters = Counters()
    times = StepTimes(counters, "m")
    params = ResolvedParams(
        prompt="a",
        negative_prompt="",
        width=16,
        height=16,
        num_frames=1,
        fps=1,
        num_inference_steps=1,
        guidance_scale=1.0,
        flow_shift=None,
        max_sequence_length=1,
        seeds=(1,),
    )
    for edge in [*range(16, 16 * 101, 16), 16]:
        times.add([dataclasses.replace(params, width=edge, height=16)], 0.5)
    counts = {
        m.labels["size"]: m.value for m in counters.metrics() if m.name == "step_seconds_count"
    }
    assert len(counts) == MOST_SIZES + 1
    assert counts[OTHER] == 100 - MOST_SIZES and counts["16x16"] == 2
