"""The card of a model that runs through diffusers: what its pipeline class says of itself."""

from __future__ import annotations

from typing import Any

import torch

from sgl_diffusion.base.device import dtype_name
from sgl_diffusion.base.params import ModelCard, SamplingDefaults
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.recipes import fallback_previews as previews
from sgl_diffusion.recipes.fallback_calls import Calls

# What pipelines call the pixels and frames of a latent.
_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def card_of(
    calls: Calls,
    index: ModelIndex,
    accepted: Any,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> ModelCard:
    video = "num_frames" in accepted
    pipe = calls.plain.pipe

    def default(argument: str, other: Any) -> Any:
        value = accepted[argument].default if argument in accepted else None
        return other if value is None else value

    def first(names: tuple[str, ...], other: int) -> int:
        found = (getattr(pipe, name, None) for name in names)
        return int(next((value for value in found if value), other))

    factor = first(_SPATIAL, 8)
    edge = int(getattr(pipe, "default_sample_size", None) or 1024 // factor) * factor
    precision = dtype_name(dtype)
    experts = getattr(pipe.config, "boundary_ratio", None) is not None
    return ModelCard(
        name=name,
        path=name,
        family="diffusers",
        pipeline_class=index.pipeline,
        backend="diffusers",
        tasks=calls.tasks(video),
        defaults=SamplingDefaults(
            width=default("width", edge),
            height=default("height", edge),
            num_frames=default("num_frames", 1) if video else 1,
            fps=int(default("frame_rate", 16)),
            num_inference_steps=default("num_inference_steps", 50),
            guidance_scale=default("guidance_scale", 1.0),
            max_sequence_length=default("max_sequence_length", 512),
            strength=calls.default_strength,
            true_cfg_scale=default("true_cfg_scale", None),
            guidance_scale_2=default("guidance_scale", 1.0) if experts else None,
        ),
        device=device.type,
        dit_precision=precision,
        vae_precision=precision,
        text_encoder_precision=precision,
        size_multiple=max(16, factor),
        frame_multiple=first(_TEMPORAL, 4) if video else 1,
        edits=calls.edits,
        min_images=int(calls.needs_picture),
        max_images=calls.max_images,
        masks=calls.inpaint is not None,
        needs_mask=calls.needs_mask,
        previews="callback_on_step_end" in accepted and previews.can_preview(pipe),
    )
