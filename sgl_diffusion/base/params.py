"""Sampling parameters: what a caller may ask for, and what a model makes of it.

`SamplingParams` is the wish (None = the model's default), `ModelCard` says what the served model
can do, and `ModelCard.resolve` turns one into `ResolvedParams` or raises a RequestError that names
the argument. Pure and free of torch: the server checks a request before it is queued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sgl_diffusion.base.checks import (
    MAX_PARTIAL_IMAGES,
    check_extent,
    check_interval,
    check_loras,
    check_pictures,
    check_texts,
    optional,
    seeds,
    strength,
    teacache_threshold,
    within,
)
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.footprint import Footprint, Offloaded
from sgl_diffusion.base.lora import LoraUse
from sgl_diffusion.base.sizes import edge, size_like

MAX_STEPS = 200
DEFAULT_PRIORITY = 5
MAX_PRIORITY = 9

Edits = Literal["none", "native", "image-to-image"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a caller asked for. `seed` may be a list: one seed per output.

    `images` and `mask` are files: PNG, JPEG or WebP. The mask tells what of the first image to
    make anew: its transparent part, or its bright part where nothing is transparent. `priority`
    goes from 0, for what can wait, to 9. With `enable_teacache` steps may reuse what an earlier one
    computed, if their beginnings differ by less than `teacache_threshold`. There is guidance from
    the share `guidance_start` of the steps to `guidance_stop`; from `cfg_gate_step` on it adds
    again what it added last.
    """

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
    images: tuple[str, ...] = ()
    mask: str | None = None
    strength: float | None = None
    true_cfg_scale: float | None = None
    guidance_scale_2: float | None = None
    partial_images: int = 0
    loras: tuple[LoraUse, ...] = ()
    priority: int = DEFAULT_PRIORITY
    enable_teacache: bool = False
    teacache_threshold: float | None = None
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cfg_gate_step: float = 1.0


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
    images: tuple[str, ...] = ()
    mask: str | None = None
    strength: float | None = None
    true_cfg_scale: float | None = None
    guidance_scale_2: float | None = None
    partial_images: int = 0
    loras: tuple[LoraUse, ...] = ()
    guidance_offset: float = 0.0
    priority: int = DEFAULT_PRIORITY
    enable_teacache: bool = False
    teacache_threshold: float | None = None
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cfg_gate_step: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether there are steps that also run without the prompt."""
        return self.cfg_scale(0) > 1.0

    def guided_at(self, step: int) -> bool:
        """Whether this step has guidance."""
        share = step / self.num_inference_steps
        return self.guided and self.guidance_start <= share < self.guidance_stop

    @property
    def gated(self) -> bool:
        """Whether guidance may add again what it added in an earlier step."""
        return self.guided and self.cfg_gate_step < self.guidance_stop

    def gated_at(self, step: int) -> bool:
        """Whether it does in this step, if there is an earlier one."""
        return self.gated and step / self.num_inference_steps >= self.cfg_gate_step

    def cfg_scale(self, expert: int) -> float:
        """How far to go from the velocity without the prompt to the one with it, and beyond."""
        if self.true_cfg_scale is not None:
            return self.true_cfg_scale
        if expert > 0 and self.guidance_scale_2 is not None:
            return self.guidance_scale_2
        return self.guidance_scale + self.guidance_offset

    @property
    def start_step(self) -> int:
        """The first step to run: `strength` is the share of the steps that a picture goes through,
        rounded up as diffusers does it. At `num_inference_steps` there is nothing to run."""
        if self.strength is None:
            return 0
        steps = self.num_inference_steps
        return int(max(steps - min(steps * self.strength, steps), 0))


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request gets when it does not say. A model does not know what is None here."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    num_frames: int = 1
    fps: int = 16
    negative_prompt: str = ""
    max_sequence_length: int = 512
    strength: float = 0.6
    true_cfg_scale: float | None = None
    guidance_scale_2: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The served model as clients see it; a worker sends it when it is ready.

    `edits` says what becomes of `images`: part of the condition, from `min_images` to `max_images`
    ("native"), or the one picture that denoising starts from ("image-to-image"). `masks` and
    `previews` say whether parts of a picture can be kept and steps be shown, `needs_mask` that some
    part must. Families that count guidance from 0, not from 1, lack `guidance_offset` in theirs.
    """

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
    edits: Edits = "none"
    min_images: int = 0
    max_images: int = 0
    masks: bool = False
    needs_mask: bool = False
    previews: bool = False
    step_cache: bool = False
    guidance_offset: float = 0.0
    lora_targets: tuple[str, ...] = ()  # the components that adapters can change
    adapters: tuple[str, ...] = ()  # files that came with the model; their names are nicknames
    offload: tuple[Offloaded, ...] = ()  # components that are not in the memory as a whole
    footprint: Footprint | None = None  # what jobs take of the memory; None where nobody counted

    @property
    def makes_video(self) -> bool:
        return any(task.endswith("V") for task in self.tasks)

    @property
    def guides(self) -> bool:
        """Whether a request that says nothing of guidance also runs without the prompt."""
        scale = self.defaults.true_cfg_scale
        if scale is None:
            scale = self.defaults.guidance_scale + self.guidance_offset
        return scale > 1.0

    def resolve(self, wish: SamplingParams, *, video: bool) -> ResolvedParams:
        """Fill in the defaults and check every value against what the model can do."""
        defaults = self.defaults
        check_texts(wish)
        check_pictures(self, wish, video=video)
        check_loras(self, wish)
        check_interval(self, wish)
        if video and not self.makes_video:
            raise RequestError(
                f"{self.name} makes images only.",
                hint="Use /v1/images/generations.",
                code="task_not_supported",
            )
        width = defaults.width if wish.width is None else wish.width
        height = defaults.height if wish.height is None else wish.height
        frames = defaults.num_frames if wish.num_frames is None else wish.num_frames
        steps = wish.num_inference_steps
        guidance = wish.guidance_scale
        length = wish.max_sequence_length
        shift = wish.flow_shift
        params = ResolvedParams(
            prompt=wish.prompt,
            negative_prompt=defaults.negative_prompt
            if wish.negative_prompt is None
            else wish.negative_prompt,
            width=edge(self, "width", width),
            height=edge(self, "height", height),
            num_frames=self.round_frames(frames) if video else 1,
            fps=int(within("fps", defaults.fps if wish.fps is None else wish.fps, 1, 120)),
            num_inference_steps=int(
                within(
                    "num_inference_steps",
                    defaults.num_inference_steps if steps is None else steps,
                    1,
                    MAX_STEPS,
                )
            ),
            guidance_scale=within(
                "guidance_scale",
                defaults.guidance_scale if guidance is None else guidance,
                -100.0,
                100.0,
            ),
            flow_shift=None if shift is None else within("flow_shift", shift, 0.01, 100.0),
            max_sequence_length=int(
                within(
                    "max_sequence_length",
                    defaults.max_sequence_length if length is None else length,
                    1,
                    defaults.max_sequence_length,
                )
            ),
            seeds=seeds(wish),
            images=wish.images,
            mask=wish.mask,
            strength=strength(self, wish),
            true_cfg_scale=optional(self, "true_cfg_scale", wish.true_cfg_scale, -100.0, 100.0),
            guidance_scale_2=optional(
                self, "guidance_scale_2", wish.guidance_scale_2, -100.0, 100.0
            ),
            partial_images=int(
                within("partial_images", wish.partial_images, 0, MAX_PARTIAL_IMAGES)
            ),
            loras=wish.loras,
            guidance_offset=self.guidance_offset,
            priority=int(within("priority", wish.priority, 0, MAX_PRIORITY)),
            enable_teacache=wish.enable_teacache,
            teacache_threshold=teacache_threshold(self, wish),
            guidance_start=wish.guidance_start,
            guidance_stop=wish.guidance_stop,
            cfg_gate_step=wish.cfg_gate_step,
        )
        check_extent(self, params)
        return params

    def size_like(
        self, across: int, down: int, *, width: int | None = None, height: int | None = None
    ) -> tuple[int, int]:
        """The size with the aspect of an `across` x `down` picture."""
        return size_like(self, (across, down), width, height)

    def round_frames(self, frames: int) -> int:
        """The count the VAE can make, as diffusers rounds it: a multiple of four, plus one."""
        within("num_frames", frames, 1, self.max_frames)
        if frames % self.frame_multiple == 1 or self.frame_multiple == 1:
            return frames
        return frames // self.frame_multiple * self.frame_multiple + 1
