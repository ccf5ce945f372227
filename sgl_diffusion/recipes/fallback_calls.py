"""Which diffusers pipeline a request goes to: the served one, or a relative that shares its parts.

A text-to-image pipeline has relatives for image-to-image and inpainting in most families; some
pipelines take pictures themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.params import Edits, ResolvedParams
from sgl_diffusion.engine import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

# What pipelines call the pictures that they read.
_PICTURES = ("image", "control_image", "reference_images")
# Arguments of every pipeline that makes something from a prompt, step by step.
_NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")
# Pipelines that read several pictures at a time; the others take a list for a batch.
_SEVERAL = {
    "Flux2KleinKVPipeline": 8,
    "Flux2KleinPipeline": 8,
    "Flux2Pipeline": 8,
    "QwenImageEditPlusPipeline": 4,
    "WanVACEPipeline": 4,
    "ZImageOmniPipeline": 4,
}

# Pipelines that take one seed only.
_ONE_SEED = ("WanVACEPipeline",)


def reason_against(name: str, accepted: Mapping[str, inspect.Parameter]) -> str | None:
    """Why requests as ours cannot be handed to the pipeline class `name`, of whose call these are
    the parameters; None if they can."""
    given = ("self", "kwargs", "args", *_NEEDED, *_PICTURES)
    needed = [
        argument
        for argument, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and argument not in given
    ]
    if needed:
        return f"it does not start from a prompt or a picture (it needs {', '.join(needed)})"
    if lacking := [argument for argument in _NEEDED if argument not in accepted]:
        return f"it does not make pictures of a prompt (it takes no {', '.join(lacking)})"
    if not accepted.keys() & {"height", *_PICTURES}:
        return "it makes no pictures"
    if "VideoToVideo" in name:  # which declare a default of None and fail on it
        return "it starts from a video"
    if "layers" in accepted:
        return "what it makes are layers of a picture"
    if "mask_image" in accepted and "strength" not in accepted:
        return "it takes a mask in a way of its own"
    if "control_image" in accepted and ("image" in accepted or "control_mask" in accepted):
        return "it takes a control picture beside the one it edits"
    return None


@dataclass(frozen=True)
class Call:
    """A pipeline and the arguments it takes."""

    pipe: Any
    accepted: frozenset[str]

    @classmethod
    def of(cls, pipe: Any) -> Call:
        return cls(pipe, frozenset(inspect.signature(type(pipe).__call__).parameters))

    @property
    def takes_seeds(self) -> bool:
        """Whether it makes several outputs at once, each from a seed of its own."""
        return type(self.pipe).__name__ not in _ONE_SEED


@dataclass(frozen=True)
class Calls:
    """What can be called: `plain` always, the others where diffusers has them."""

    plain: Call
    edit: Call | None = None
    inpaint: Call | None = None
    edits: Edits = "none"
    needs_picture: bool = False
    needs_mask: bool = False

    @classmethod
    def of(cls, pipe: Any) -> Calls:
        plain = Call.of(pipe)
        if name := picture_name(plain):
            again = "strength" in plain.accepted
            masked = "mask_image" in plain.accepted
            declared = inspect.signature(type(pipe).__call__).parameters[name]
            # Some declare a default of None and fail on it.
            needed = (
                declared.default is inspect.Parameter.empty
                or name == "control_image"
                or "ImageToVideo" in type(pipe).__name__
            )
            return cls(
                plain,
                plain,
                plain if masked else None,
                edits="image-to-image" if again else "native",
                needs_picture=again or masked or needed,
                needs_mask=masked,
            )
        edit = _relative(pipe, "AutoPipelineForImage2Image", ("image", "strength"))
        inpaint = _relative(pipe, "AutoPipelineForInpainting", ("image", "mask_image", "strength"))
        if edit is None:
            return cls(plain)
        return cls(plain, edit, inpaint, edits="image-to-image")

    @property
    def default_strength(self) -> float:
        if self.edits != "image-to-image" or self.edit is None:
            return 1.0
        default = inspect.signature(type(self.edit.pipe).__call__).parameters["strength"].default
        return float(default)

    def tasks(self, video: bool) -> tuple[str, ...]:
        """As clients of SGLang call them."""
        if self.needs_picture:
            return ("I2V",) if video else ("TI2I",)
        if self.edits == "none":
            return ("T2I", "T2V") if video else ("T2I",)
        return ("T2I", "T2V", "TI2V") if video else ("T2I", "TI2I")

    @property
    def max_images(self) -> int:
        if self.edit is None:
            return 0
        return _SEVERAL.get(type(self.edit.pipe).__name__, 1)

    def choose(self, params: ResolvedParams) -> Call:
        chosen = self.plain if not params.images else self.edit
        if params.mask is not None:
            chosen = self.inpaint
        assert chosen is not None, "the card says which calls there are"
        return chosen


def picture_name(call: Call) -> str | None:
    """What the pipeline calls its pictures; None if it reads none."""
    return next((name for name in _PICTURES if name in call.accepted), None)


def picture_arguments(
    call: Call, params: ResolvedParams, given: Sequence[Image], edits: Edits
) -> dict[str, Any]:
    """The arguments that hand over the input pictures."""
    arguments: dict[str, Any]
    if edits == "native":
        name = picture_name(call)
        assert name is not None, "the card says that pictures can be given"
        several = len(given) > 1 or name == "reference_images"
        arguments = {name: list(given) if several else given[0]}
        if "max_area" in call.accepted:  # else it brings the size to an area of its own
            arguments["max_area"] = params.width * params.height
        return arguments
    size = (params.width, params.height)
    arguments = {
        "image": pictures.resize(given[0], *size),
        "strength": params.strength,
    }
    if params.mask is not None:
        mask = pictures.open_mask(params.mask, given[0].size)
        arguments["mask_image"] = pictures.resize(mask, *size)
    return arguments


def _relative(pipe: Any, auto: str, needed: tuple[str, ...]) -> Call | None:
    """The pipeline that diffusers makes of the parts of `pipe`; None if it knows none."""
    import diffusers

    try:
        relative = getattr(diffusers, auto).from_pipe(pipe)
    except (ValueError, TypeError, AttributeError):
        return None
    relative.set_progress_bar_config(disable=True)
    call = Call.of(relative)
    return call if call.accepted.issuperset(needed) else None
