"""What a client may send to the video routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sgl_diffusion.base.checks import MAX_OUTPUTS, MAX_PARTIAL_IMAGES
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.server.body import parse_json
from sgl_diffusion.server.media import VIDEO_QUALITY
from sgl_diffusion.server.schemas.common import NEUTRAL, PRESETS, Sampling
from sgl_diffusion.server.validate import Int, RequestBody, Whole, whole

_MAX_SECONDS = 3_600
Count = Annotated[Whole, Field(ge=1, le=MAX_OUTPUTS)]
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow",
]  # fmt: skip


class VideoRequest(Sampling):
    """POST /v1/videos"""

    route = "POST /v1/videos"
    neutral = NEUTRAL | {
        "enable_frame_interpolation": (False,),
        "frame_interpolation_exp": (1,),
        "frame_interpolation_model_path": (),
        "frame_interpolation_scale": (1.0,),
        "quality": ("auto", "standard"),
        "task_type": ("T2V", "I2V", "TI2V"),
        "video_path": (),
        "video_reference": (),
        "video_url": (),
    }

    seconds: str | Int | None = None
    """A whole number, as text or number; frames = seconds x fps."""
    fps: Annotated[Whole, Field(ge=1, le=120)] | None = None
    """1 to 120; the model's own unless given."""
    num_frames: Int | None = None
    """Rounded to what the VAE can make (Wan: a multiple of 4, plus 1); the model's own unless
    given."""
    n: Count | None = None
    """1 to 10 clips in one job: clip *i* is at `content?index=i`."""
    num_outputs_per_prompt: Count | None = None
    """Another name of `n`."""
    x264_preset: Preset = "fast"
    """`ultrafast` to `veryslow`: slower ones make smaller files."""
    input_reference: Any = None
    """The picture to begin with: a file, a URL, a data URL, or `{"image_url"}`; only models that
    make videos from pictures take one. Without a size the video gets the picture's aspect."""
    reference_url: str | None = None
    """Another name of `input_reference`, for a URL."""
    partial_images: Annotated[Whole, Field(ge=0, le=MAX_PARTIAL_IMAGES)] = 0
    """0 to 3: pictures under way, each a frame from the middle of the clip; `preview_url` says
    where the newest is."""

    @field_validator("seconds", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> int | None:
        if value is None:
            return None
        value = whole(value)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RequestError(
                "seconds must be a whole number.",
                hint="Also as text, which is what OpenAI's clients send.",
                code="invalid_type",
                param="seconds",
            )
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

    @model_validator(mode="after")
    def _agree(self) -> VideoRequest:
        if self.n and self.num_outputs_per_prompt and self.n != self.num_outputs_per_prompt:
            raise RequestError(
                "n and num_outputs_per_prompt are two names of one number.",
                hint="Send one of the two.",
                code="conflicting_parameters",
                param="num_outputs_per_prompt",
            )
        self.reference()
        return self

    def reference(self) -> tuple[str, Any] | None:
        """The picture to begin with, as a file or a text, and the name to blame for it."""
        given, param = self.input_reference, "input_reference"
        if isinstance(given, str) and given.lstrip().startswith("{"):  # an object as form text
            given = parse_json(given)
        if isinstance(given, dict):
            given, param = _of_object(given)
        if self.reference_url is None:
            return None if given is None else (param, given)
        if given is not None:
            raise RequestError(
                "input_reference and reference_url are two names of one picture.",
                hint="Send one of the two.",
                code="conflicting_parameters",
                param="reference_url",
            )
        return "reference_url", self.reference_url

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
            guidance_scale_2=self.guidance_scale_2,
            true_cfg_scale=self.true_cfg_scale,
            flow_shift=self.flow_shift,
            max_sequence_length=self.max_sequence_length,
            priority=self.priority,
            guidance_start=self.guidance_start,
            guidance_stop=self.guidance_stop,
            cfg_gate_step=self.cfg_gate_step,
            enable_teacache=self.enable_teacache,
            teacache_threshold=self.teacache_threshold,
            partial_images=self.partial_images,
            num_outputs=self.n or self.num_outputs_per_prompt or 1,
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
        return PRESETS.get(self.output_quality, VIDEO_QUALITY)


def _of_object(given: dict[str, Any]) -> tuple[Any, str]:
    """OpenAI's {"image_url"} or {"file_id"}."""
    param = "input_reference"
    if given.get("file_id") is not None:
        raise RequestError(
            "This server keeps no files that a request could name.",
            hint="Send the picture itself, or its image_url.",
            code="unsupported_parameter",
            param=f"{param}.file_id",
        )
    rest = set(given) - {"file_id", "image_url"}
    if rest or not isinstance(given.get("image_url"), str):
        raise RequestError(
            "input_reference must be a file, a URL, or an object with image_url.",
            code="invalid_type",
            param=param,
        )
    return given["image_url"], f"{param}.image_url"


class RemixRequest(RequestBody):
    """POST /v1/videos/{id}/remix"""

    prompt: str
    """The new prompt; everything else is as it was."""
