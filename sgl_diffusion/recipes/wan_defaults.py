"""What a request gets from each published Wan model when it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_diffusion.base.params import SamplingDefaults
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.models.wan import WanParams

SMALL = SamplingDefaults(
    width=832, height=480, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0
)
LARGE = SamplingDefaults(
    width=1280, height=720, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0
)
EXPERTS_T2V = SamplingDefaults(
    width=1280,
    height=720,
    num_frames=81,
    fps=16,
    num_inference_steps=40,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
)
EXPERTS_I2V = SamplingDefaults(
    width=832,
    height=480,
    num_frames=81,
    fps=16,
    num_inference_steps=40,
    guidance_scale=3.5,
    guidance_scale_2=3.5,
)
FIRST_FRAME = SamplingDefaults(
    width=1280, height=704, num_frames=121, fps=24, num_inference_steps=50, guidance_scale=5.0
)
_LARGE_SHIFT = 5.0  # of the noise schedule; models of 480 rows have 3
_LARGE_WIDTH = 5120  # of the 14B transformers


def defaults_of(
    index: ModelIndex, params: WanParams, scheduler: Mapping[str, Any]
) -> SamplingDefaults:
    if index.options.get("expand_timesteps"):
        return FIRST_FRAME
    if "transformer_2" in index.components:
        return EXPERTS_I2V if index.pipeline.startswith("WanImage") else EXPERTS_T2V
    large = float(scheduler.get("flow_shift") or 0) >= _LARGE_SHIFT
    return LARGE if large and params.width >= _LARGE_WIDTH else SMALL
