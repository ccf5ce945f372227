"""Which diffusers pipeline a request goes to: the served one, or a relative that shares its parts.

A text-to-image pipeline has relatives for image-to-image and inpainting in most families; some
pipelines take pictures themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.params import Edits, ResolvedParams
from sgl_diffusion.engine import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

# Pipelines that read several pictures at a time; the others take a list for a batch.
_SEVERAL = {
    "Flux2KleinPipeline": 8,
    "Flux2Pipeline": 8,
    "QwenImageEditPlusPipeline": 4,
}


@dataclass(frozen=True)
class Call:
    """A pipeline and the arguments it takes."""

    pipe: Any
    accepted: frozenset[str]

    @classmethod
    def of(cls, pipe: Any) -> Call:
        return cls(pipe, frozenset(inspect.signature(type(pipe).__call__).parameters))


@dataclass(frozen=True)
class Calls:
    """What can be called: `plain` always, the others where diffusers has them."""

    plain: Call
    edit: Call | None = None
    inpaint: Call | None = None
    edits: Edits = "none"
    needs_picture: bool = False

    @classmethod
    def of(cls, pipe: Any) -> Calls:
        plain = Call.of(pipe)
        if "image" in plain.accepted:
            again = "strength" in plain.accepted
            declared = inspect.signature(type(pipe).__call__).parameters["image"]
            # Some declare a default of None and fail on it.
            needed = declared.default is inspect.Parameter.empty or (
                "ImageToVideo" in type(pipe).__name__
            )
            return cls(
                plain,
                plain,
                edits="image-to-image" if again else "native",
                needs_picture=again or needed,
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


def picture_arguments(
    call: Call, params: ResolvedParams, given: Sequence[Image], edits: Edits
) -> dict[str, Any]:
    """The arguments that hand over the input pictures."""
    arguments: dict[str, Any]
    if edits == "native":
        arguments = {"image": list(given) if len(given) > 1 else given[0]}
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
