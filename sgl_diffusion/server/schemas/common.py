"""The fields that image and video requests share, and the fields of other servers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import MAX_USES
from sgl_diffusion.base.params import DEFAULT_PRIORITY, MAX_PRIORITY
from sgl_diffusion.server.schemas.lora import Lora, parse_lora
from sgl_diffusion.server.validate import Edge, Int, RequestBody, Whole

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
    "diffusers_kwargs": ({},),
    "enable_cache_dit": (False,),
    "enable_upscaling": (False,),
    "enhance_prompt": (False,),
    "generator_device": ("cpu", "cuda"),
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
# Why some of them change nothing.
REASONS = {
    "generator_device": "The noise is always drawn on the CPU",
    "input_fidelity": "A hint the models do not take",
    "moderation": "There is none",
    "style": "A hint the models do not take",
}


class Sampling(RequestBody):
    """The fields that images and videos share."""

    prompt: str
    """Up to 32,000 characters."""
    model: Annotated[str, Field(max_length=512)] | None = None
    """The served name or the model path, with `:nickname` behind it for an adapter; anything else
    is 404."""
    negative_prompt: str | None = None
    """The model's own unless given."""
    size: str | None = None
    """`WIDTHxHEIGHT` or `auto`, which is the model's own; edges are multiples of the model's unit
    (Wan: 16)."""
    width: Edge | None = None
    """Wins over `size`."""
    height: Edge | None = None
    """Wins over `size`."""
    num_inference_steps: Int | None = None
    """1 to 200; the model's own unless given."""
    guidance_scale: float | None = None
    """-100 to 100, the model's own unless given; 1 and below run without guidance."""
    guidance_scale_2: float | None = None
    """Guidance of the second expert, for models that have two."""
    true_cfg_scale: float | None = None
    """Guidance by a negative prompt, for models whose `guidance_scale` is something else; other
    models take 1 only."""
    flow_shift: float | None = None
    """0.01 to 100; the model's own unless given."""
    max_sequence_length: Int | None = None
    """Text tokens, 1 to the model's own length."""
    priority: Annotated[Whole, Field(ge=0, le=MAX_PRIORITY)] = DEFAULT_PRIORITY
    """0 (can wait) to 9; each step doubles the job's share of the time beside others."""
    guidance_start: float = 0.0
    """With `guidance_stop` the shares of the steps between which there is guidance; the other steps
    run with the prompt only, in about half the time."""
    guidance_stop: float = 1.0
    """See `guidance_start`."""
    cfg_gate_step: float = 1.0
    """0 to 1, a share of the steps: from it on only the prompt is computed, and guidance adds again
    what it added last ([serving](serving.md))."""
    enable_teacache: bool = False
    """Steps may reuse what an earlier one computed: faster, and not the same picture
    ([serving](serving.md))."""
    teacache_threshold: float | None = None
    """How far the first block's work may differ for that: 0.001 to 1, 0.1 unless given."""
    seed: Int | list[Int] | None = None
    """0 to 2^63-1, 42 unless given; a number or a list with one seed per output; image *i* gets
    seed + *i*."""
    output_quality: OutputQuality = "default"
    """`output_compression` as a word: `maximum` `max` `xhigh` 100, `high` 90, `medium` 55, `low`
    35, `default` `auto` 75 (video 50)."""
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = None
    """0 to 100, the quality of JPEG, WebP and MP4; PNG ignores it."""
    lora: Annotated[list[Lora], Field(max_length=MAX_USES)] = []
    """Up to 16 adapters of this request: `[{"nickname", "strength": 1.0, "path"}]`; a path is
    needed where the nickname is new, and may have a `weight_name`, `revision` and `alpha` beside it
    ([below](#adapters)). In a form JSON text."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Up to 512 characters; not used."""

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
