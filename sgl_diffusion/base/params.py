"""Sampling parameters: what a caller may ask for, and what a model makes of it.

`SamplingParams` is the wish (None = the model's default), `ModelCard` says what the served model
can do, and `ModelCard.resolve` turns one into `ResolvedParams` or raises a RequestError that names
the argument. Pure and free of torch: the server checks a request before it is queued.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import LoraUse, check_uses

MAX_PROMPT_CHARS = 32_000
MAX_OUTPUTS = 10
MAX_STEPS = 200
MAX_SEED = 2**63 - 1
DEFAULT_SEED = 42


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a caller asked for. `seed` may be a list: one seed per output."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    max_sequence_length: int | None = None
    num_outputs: int = 1
    seed: int | tuple[int, ...] | None = None
    loras: tuple[LoraUse, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ResolvedParams:
    """What will be done: every value is known, valid for the served model, and reproducible."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float | None
    max_sequence_length: int
    seeds: tuple[int, ...]
    loras: tuple[LoraUse, ...] = ()

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request gets when it does not say."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    num_frames: int = 1
    fps: int = 16
    negative_prompt: str = ""
    max_sequence_length: int = 512


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The served model as clients see it; a worker sends it when it is ready."""

    name: str
    path: str
    family: str
    pipeline_class: str
    backend: str
    tasks: tuple[str, ...]
    defaults: SamplingDefaults
    device: str = "cpu"
    dit_precision: str = "fp32"
    vae_precision: str = "fp32"
    text_encoder_precision: str = "fp32"
    attention_backend: str = "sdpa"
    size_multiple: int = 16
    max_edge: int = 4096
    frame_multiple: int = 4
    max_frames: int = 241
    max_pixels: int = 2**28  # of all outputs and frames together
    note: str = ""
    lora_targets: tuple[str, ...] = ()  # the components that adapters can change

    @property
    def makes_video(self) -> bool:
        return any(task.endswith("V") for task in self.tasks)

    def resolve(self, wish: SamplingParams, *, video: bool) -> ResolvedParams:
        """Fill in the defaults and check every value against what the model can do."""
        defaults = self.defaults
        if not wish.prompt.strip():
            raise RequestError("The prompt is empty.", code="prompt_empty", param="prompt")
        for param, text in (("prompt", wish.prompt), ("negative_prompt", wish.negative_prompt)):
            if text is not None and len(text) > MAX_PROMPT_CHARS:
                raise RequestError(
                    f"{param} has {len(text)} characters; the limit is {MAX_PROMPT_CHARS}.",
                    code="prompt_too_long",
                    param=param,
                )
            if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
                raise RequestError(
                    f"{param} is not valid Unicode.",
                    hint="On a command line it has to be UTF-8.",
                    code="invalid_unicode",
                    param=param,
                )
        if video and not self.makes_video:
            raise RequestError(
                f"{self.name} makes images only.",
                hint="Use /v1/images/generations.",
                code="task_not_supported",
            )
        width = defaults.width if wish.width is None else wish.width
        height = defaults.height if wish.height is None else wish.height
        frames = defaults.num_frames if wish.num_frames is None else wish.num_frames
        seeds = self._seeds(wish)
        steps = wish.num_inference_steps
        guidance = wish.guidance_scale
        length = wish.max_sequence_length
        shift = wish.flow_shift
        params = ResolvedParams(
            prompt=wish.prompt,
            negative_prompt=defaults.negative_prompt
            if wish.negative_prompt is None
            else wish.negative_prompt,
            width=self._edge("width", width),
            height=self._edge("height", height),
            num_frames=self.round_frames(frames) if video else 1,
            fps=int(_within("fps", defaults.fps if wish.fps is None else wish.fps, 1, 120)),
            num_inference_steps=int(
                _within(
                    "num_inference_steps",
                    defaults.num_inference_steps if steps is None else steps,
                    1,
                    MAX_STEPS,
                )
            ),
            guidance_scale=_within(
                "guidance_scale",
                defaults.guidance_scale if guidance is None else guidance,
                -100.0,
                100.0,
            ),
            flow_shift=None if shift is None else _within("flow_shift", shift, 0.01, 100.0),
            max_sequence_length=int(
                _within(
                    "max_sequence_length",
                    defaults.max_sequence_length if length is None else length,
                    1,
                    defaults.max_sequence_length,
                )
            ),
            seeds=seeds,
            loras=self._loras(wish),
        )
        self._check_pixels(params)
        return params

    def _loras(self, wish: SamplingParams) -> tuple[LoraUse, ...]:
        check_uses(wish.loras)
        if wish.loras and not self.lora_targets:
            raise RequestError(
                f"{self.name} takes no adapters: it is served through the {self.backend} backend.",
                code="lora_not_supported",
                param="lora",
            )
        return wish.loras

    def _check_pixels(self, params: ResolvedParams) -> None:
        count = len(params.seeds)
        pixels = params.width * params.height * params.num_frames * count
        if pixels > self.max_pixels:
            raise RequestError(
                f"{count} x {params.num_frames} frames of {params.width}x{params.height} are "
                f"{pixels / 1e6:.0f} million pixels; the limit is {self.max_pixels / 1e6:.0f}.",
                hint="Ask for a smaller size, fewer frames or fewer outputs.",
                code="request_too_large",
            )

    def round_frames(self, frames: int) -> int:
        """The count the VAE can make, as diffusers rounds it: a multiple of four, plus one."""
        _within("num_frames", frames, 1, self.max_frames)
        if frames % self.frame_multiple == 1 or self.frame_multiple == 1:
            return frames
        return frames // self.frame_multiple * self.frame_multiple + 1

    def _edge(self, param: str, value: int) -> int:
        unit = self.size_multiple
        if unit <= value <= self.max_edge and value % unit == 0:
            return value
        below = min(max(value // unit * unit, unit), self.max_edge // unit * unit)
        above = min(below + unit, self.max_edge // unit * unit)
        nearest = f"{below}" if value <= below or below == above else f"{below} or {above}"
        raise RequestError(
            f"{param} {value} is not a multiple of {unit} from {unit} to {self.max_edge}.",
            hint=f"Nearest: {nearest}.",
            code="invalid_size",
            param=param,
        )

    def _seeds(self, wish: SamplingParams) -> tuple[int, ...]:
        count = int(_within("n", wish.num_outputs, 1, MAX_OUTPUTS))
        seed = DEFAULT_SEED if wish.seed is None else wish.seed
        if isinstance(seed, int):
            _within("seed", seed, 0, MAX_SEED)
            return tuple((seed + i) % (MAX_SEED + 1) for i in range(count))
        if len(seed) != count:
            raise RequestError(
                f"seed lists {len(seed)} values for {count} outputs.",
                hint="Give one seed per output, or a single number.",
                code="mismatched_lengths",
                param="seed",
            )
        return tuple(int(_within("seed", value, 0, MAX_SEED)) for value in seed)


def _within(param: str, value: float, low: float, high: float) -> float:
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{param} is not a finite number.", code="not_finite", param=param)
    if low <= value <= high:
        return value
    raise RequestError(
        f"{param} is {_plain(value)}; it must be from {_plain(low)} to {_plain(high)}.",
        code="out_of_range",
        param=param,
    )


def _plain(value: float) -> str:
    if abs(value) > 1e20:
        return "far off"
    return str(value) if isinstance(value, int) else f"{value:g}"
