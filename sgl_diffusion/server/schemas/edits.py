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
        "input_fidelity": ("low", "high"),  # a hint the models do not take
        "markup": (),
        "num_frames": (1,),
        "task_type": ("I2I", "TI2I"),
    }

    image: list[Any] | None = None
    url: list[Any] | None = None
    mask: Any = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None

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
