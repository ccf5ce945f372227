"""What clients may send: the OpenAI fields and the diffusion fields, one model per route.

docs/api.md lists every field; a test compares it with these tables.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.server.media import IMAGE_QUALITY, VIDEO_QUALITY
from sgl_diffusion.server.validate import Edge, Int, RequestBody

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_PRESETS = {
    "maximum": 100,
    "max": 100,
    "xhigh": 100,
    "high": 90,
    "medium": 55,
    "low": 35,
}
_MAX_SECONDS = 3_600

OutputQuality = Literal["default", "auto", "low", "medium", "high", "xhigh", "max", "maximum"]
Quality = Literal[
    "auto", "low", "medium", "high", "xhigh", "max",
    "standard", "hd", "default", "maximum", "exact", "lossless", "extra-high",
]  # fmt: skip

# Features of other servers that this one does not have, at the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_backend_override": (),
    "cache_dit_params": ({},),
    "cfg_gate_step": (1.0,),
    "diffusers_kwargs": ({},),
    "enable_cache_dit": (False,),
    "enable_teacache": (False,),
    "enable_upscaling": (False,),
    "enhance_prompt": (False,),
    "generator_device": ("cpu", "cuda"),  # the noise is always drawn on the CPU
    "guidance_scale_2": (),
    "num_profiled_timesteps": (),
    "output_path": (),
    "perf_dump_path": (),
    "profile": (False,),
    "profile_all_stages": (False,),
    "progressive_delta": (),
    "progressive_levels": (),
    "progressive_mode": ("fullres",),
    "skip_softmax_params": ({},),
    "true_cfg_scale": (1.0,),
    "upscaling_model_path": (),
    "upscaling_scale": (4,),
}


class _Sampling(RequestBody):
    """The fields that images and videos share."""

    prompt: str
    model: Annotated[str, Field(max_length=512)] | None = None
    negative_prompt: str | None = None
    size: str | None = None
    width: Edge | None = None
    height: Edge | None = None
    num_inference_steps: Int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    max_sequence_length: Int | None = None
    seed: Int | list[Int] | None = None
    output_quality: OutputQuality = "default"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @field_validator("size")
    @classmethod
    def _size(cls, text: str | None) -> str | None:
        if text in (None, "", "auto"):
            return None
        assert text is not None
        if not _SIZE.fullmatch(text):
            raise RequestError(
                "size is not WIDTHxHEIGHT.",
                hint="For example 1024x1024, or auto.",
                code="invalid_size",
                param="size",
            )
        return text

    def edges(self) -> tuple[int | None, int | None]:
        match = _SIZE.fullmatch(self.size or "")
        width, height = (int(match[1]), int(match[2])) if match else (None, None)
        return self.width or width, self.height or height

    def seeds(self) -> int | tuple[int, ...] | None:
        return tuple(self.seed) if isinstance(self.seed, list) else self.seed


class ImageRequest(_Sampling):
    """POST /v1/images/generations"""

    neutral = _NEUTRAL | {
        "complexity": (),
        "frame_count": (),
        "frame_duration_ms": (),
        "moderation": ("auto", "low"),  # there is none
        "style": ("vivid", "natural"),  # a hint the models do not take
        "svg": (),
        "task_type": ("T2I", "T2V"),
    }

    n: Int = 1
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Quality = "auto"
    background: Literal["auto", "opaque", "transparent"] = "auto"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None

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
        if self.stream:
            raise RequestError(
                "Images are not streamed.",
                hint="Leave stream out.",
                code="streaming_not_supported",
                param="stream",
            )
        if self.partial_images:
            raise RequestError(
                "partial_images needs stream.",
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

    def wish(self) -> SamplingParams:
        width, height = self.edges()
        return SamplingParams(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            flow_shift=self.flow_shift,
            max_sequence_length=self.max_sequence_length,
            num_outputs=self.n,
            seed=self.seeds(),
        )

    def file_quality(self) -> int:
        """0 to 100 for JPEG and WebP: the number, else the preset, else the word of `quality`."""
        if self.output_compression is not None:
            return self.output_compression
        if self.output_quality in _PRESETS:
            return _PRESETS[self.output_quality]
        return _PRESETS.get("high" if self.quality == "hd" else self.quality, IMAGE_QUALITY)


class VideoRequest(_Sampling):
    """POST /v1/videos"""

    neutral = _NEUTRAL | {
        "enable_frame_interpolation": (False,),
        "frame_interpolation_exp": (1,),
        "frame_interpolation_model_path": (),
        "frame_interpolation_scale": (1.0,),
        "input_reference": (),
        "n": (1,),
        "num_outputs_per_prompt": (1,),
        "quality": ("auto", "standard"),
        "reference_url": (),
        "task_type": ("T2V",),
        "video_path": (),
        "video_reference": (),
        "video_url": (),
        "x264_preset": ("fast",),
    }

    seconds: str | Int | None = None
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    num_frames: Int | None = None

    @field_validator("seconds")
    @classmethod
    def _seconds(cls, value: str | int | None) -> str | int | None:
        if value is None:
            return None
        text = str(value)
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
        if not 1 <= number <= _MAX_SECONDS:
            raise RequestError(
                f"seconds must be a whole number from 1 to {_MAX_SECONDS}.",
                hint="Use num_frames for other lengths.",
                code="out_of_range",
                param="seconds",
            )
        return number

    def wish(self, card: ModelCard) -> SamplingParams:
        """`card` is the served model: its rate turns seconds into frames."""
        width, height = self.edges()
        return SamplingParams(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            num_frames=self._frames(card),
            fps=self.fps,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            flow_shift=self.flow_shift,
            max_sequence_length=self.max_sequence_length,
            seed=self.seeds(),
        )

    def _frames(self, card: ModelCard) -> int | None:
        if self.seconds is None:
            return self.num_frames
        fps = card.defaults.fps if self.fps is None else self.fps
        frames = int(self.seconds) * fps
        if self.num_frames is None:
            if frames > card.max_frames:
                raise RequestError(
                    f"{self.seconds} seconds at {fps} frames per second are {frames} frames; "
                    f"the model makes at most {card.max_frames}.",
                    code="out_of_range",
                    param="seconds",
                )
            return frames
        if card.round_frames(self.num_frames) != card.round_frames(min(frames, card.max_frames)):
            raise RequestError(
                f"seconds is {self.seconds}, but {self.num_frames} frames at {fps} per second "
                "are not that long.",
                hint="Send one of the two.",
                code="conflicting_parameters",
                param="num_frames",
            )
        return self.num_frames

    def file_quality(self) -> int:
        """0 to 100 for the video encoder."""
        if self.output_compression is not None:
            return self.output_compression
        return _PRESETS.get(self.output_quality, VIDEO_QUALITY)
