"""What a client may send to POST /v1/images/edits."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.server.schemas.images import ImageRequest


class EditRequest(ImageRequest):
    """POST /v1/images/edits, always a form. Files are checked where they are read."""

    route = "POST /v1/images/edits"
    neutral = ImageRequest.neutral | {
        "input_fidelity": ("low", "high"),
        "markup": (),
        "num_frames": (1,),
        "task_type": ("I2I", "TI2I"),
    }

    image: list[Any] | None = None
    """A PNG, JPEG or WebP file; `image[]`, or the field repeated, for models that take several."""
    url: list[Any] | None = None
    """The same as an http, https or data URL; also `url[]`."""
    mask: Any = None
    """A file of the first picture's size. Its transparent part is made anew, or its bright part
    where nothing is transparent; outside every pixel of the output is the picture's."""
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """0 to 1, image-to-image only: the share of the steps that are run; the model's own unless
    given, 1 with a mask. 0 gives the picture back, 1 is text-to-image."""

    def edit_wish(
        self, card: ModelCard, size: tuple[int, int], images: tuple[str, ...], mask: str | None
    ) -> SamplingParams:
        """`size` is that of the first picture: it gives the output its shape unless the request
        does."""
        width, height = self.edges()
        if width is None or height is None:
            width, height = card.size_like(*size, width=width, height=height)
        return self.wish(
            width=width, height=height, images=images, mask=mask, strength=self.strength
        )
