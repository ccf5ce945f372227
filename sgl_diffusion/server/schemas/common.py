"""The fields that image and video requests share, and the fields of other servers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import MAX_USES
from sgl_diffusion.base.params import DEFAULT_PRIORITY, MAX_PRIORITY
from sgl_diffusion.server.schemas.lora import Lora, parse_lora
from sgl_diffusion.server.validate import Edge, Int, RequestBody

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
PRESETS = {
    "maximum": 100,
    "max": 100,
    "xhigh": 100,
    "high": 90,
    "medium": 55,
    "low": 35,
}

OutputQuality = Literal["default", "auto", "low", "medium", "high", "xhigh", "max", "maximum"]
Quality = Literal[
    "auto", "low", "medium", "high", "xhigh", "max",
    "standard", "hd", "default", "maximum", "exact", "lossless", "extra-high",
]  # fmt: skip

# Features of other servers that this one does not have, at the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_backend_override": (),
    "cache_dit_params": ({},),
    "cfg_gate_step": (1.0,),
    "diffusers_kwargs": ({},),
    "enable_cache_dit": (False,),
    "enable_teacache": (False,),
    "enable_upscaling": (False,),
    "enhance_prompt": (False,),
    "generator_device": ("cpu", "cuda"),  # the noise is always drawn on the CPU
    "num_profiled_timesteps": (),
    "output_path": (),
    "perf_dump_path": (),
    "profile": (False,),
    "profile_all_stages": (False,),
    "progressive_delta": (),
    "progressive_levels": (),
    "progressive_mode": ("fullres",),
    "skip_softmax_params": ({},),
    "upscaling_model_path": (),
    "upscaling_scale": (4,),
}


class Sampling(RequestBody):
    """The fields that images and videos share."""

    prompt: str
    model: Annotated[str, Field(max_length=512)] | None = None
    negative_prompt: str | None = None
    size: str | None = None
    width: Edge | None = None
    height: Edge | None = None
    num_inference_steps: Int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    flow_shift: float | None = None
    max_sequence_length: Int | None = None
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = DEFAULT_PRIORITY
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    enable_teacache: bool = False
    teacache_threshold: float | None = None
    seed: Int | list[Int] | None = None
    output_quality: OutputQuality = "default"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    lora: Annotated[list[Lora], Field(max_length=MAX_USES)] = []
    user: Annotated[str, Field(max_length=512)] | None = None

    @field_validator("lora", mode="before")
    @classmethod
    def _lora(cls, value: Any) -> Any:
        """In a form every entry is JSON text, and so may the whole list be."""
        entries = [value] if isinstance(value, str | dict) else value
        if not isinstance(entries, list):
            return entries
        read = [parse_lora(entry) if isinstance(entry, str) else entry for entry in entries]
        return read[0] if len(read) == 1 and isinstance(read[0], list) else read

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
