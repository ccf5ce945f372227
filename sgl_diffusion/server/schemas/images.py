"""What a client may send to the image routes."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sgl_diffusion.base.checks import MAX_PARTIAL_IMAGES
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.server.media import IMAGE_QUALITY
from sgl_diffusion.server.schemas.common import NEUTRAL, PRESETS, Quality, Sampling
from sgl_diffusion.server.validate import Int, Whole


class ImageRequest(Sampling):
    """POST /v1/images/generations"""

    route = "POST /v1/images/generations"
    neutral = NEUTRAL | {
        "complexity": (),
        "frame_count": (),
        "frame_duration_ms": (),
        "moderation": ("auto", "low"),
        "style": ("vivid", "natural"),
        "svg": (),
        "task_type": ("T2I", "T2V", "TI2I"),
    }

    n: Int = 1
    """1 to 10."""
    response_format: Literal["b64_json", "url"] | None = None
    """`b64_json` or `url`; without it `b64_json` and `url` are filled. Only an image with a URL is
    kept."""
    output_format: Literal["png", "jpeg", "webp"] = "png"
    """`png`, `jpeg` or `webp`."""
    quality: Quality = "auto"
    """Decides the quality of the file where `output_quality` does not; never skips work."""
    background: Literal["auto", "opaque", "transparent"] = "auto"
    """`auto` or `opaque`; no model makes transparent pictures."""
    stream: bool = False
    """`true`: the answer is a stream of events."""
    partial_images: Annotated[Whole, Field(ge=0, le=MAX_PARTIAL_IMAGES)] = 0
    """0 to 3, with `stream`: pictures under way, of steps spread evenly; a job with few steps has
    fewer."""
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """Up to 512 characters; not used."""

    @field_validator("output_format", mode="before")
    @classmethod
    def _format(cls, value: Any) -> Any:
        if value in ("gif", "svg"):
            raise RequestError(
                f"This server makes no {value} files.",
                hint="Use png, jpeg or webp.",
                code="unsupported_parameter",
                param="output_format",
            )
        return value

    @model_validator(mode="after")
    def _agree(self) -> ImageRequest:
        if self.partial_images and not self.stream:
            raise RequestError(
                "partial_images needs stream.",
                hint="Send stream=true with it.",
                code="conflicting_parameters",
                param="partial_images",
            )
        if self.background == "transparent":
            opaque = self.output_format == "jpeg"
            raise RequestError(
                "JPEG has no transparency." if opaque else "The model makes opaque pictures only.",
                hint="Leave background out.",
                code="conflicting_parameters" if opaque else "unsupported_parameter",
                param="background",
            )
        return self

    def wish(self, **more: Any) -> SamplingParams:
        """`more` is added, and wins."""
        width, height = self.edges()
        wish = SamplingParams(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_scale_2=self.guidance_scale_2,
            true_cfg_scale=self.true_cfg_scale,
            partial_images=self.partial_images,
            flow_shift=self.flow_shift,
            max_sequence_length=self.max_sequence_length,
            priority=self.priority,
            guidance_start=self.guidance_start,
            guidance_stop=self.guidance_stop,
            cfg_gate_step=self.cfg_gate_step,
            enable_teacache=self.enable_teacache,
            teacache_threshold=self.teacache_threshold,
            num_outputs=self.n,
            seed=self.seeds(),
        )
        return dataclasses.replace(wish, **more)

    def file_quality(self) -> int:
        """0 to 100 for JPEG and WebP: the number, else the preset, else the word of `quality`."""
        if self.output_compression is not None:
            return self.output_compression
        if self.output_quality in PRESETS:
            return PRESETS[self.output_quality]
        return PRESETS.get("high" if self.quality == "hd" else self.quality, IMAGE_QUALITY)
