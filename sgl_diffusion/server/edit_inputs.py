"""The pictures of an edit: read through the guards, and put down again for the worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import ModelCard
from sgl_diffusion.server.context import ServerContext
from sgl_diffusion.server.files import Files
from sgl_diffusion.server.schemas import EditRequest

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Pictures:
    images: list[Image]
    mask: Image | None

    @property
    def size(self) -> tuple[int, int]:
        return self.images[0].size


class EditInputs:
    """The input files of one job: `images` and `mask` say where they are once `keep` is done."""

    def __init__(self, files: Files, job_id: str, pictures: Pictures) -> None:
        self._files, self._job_id, self._pictures = files, job_id, pictures
        count = len(pictures.images)
        self.images = tuple(str(files.input(job_id, index)) for index in range(count))
        self.mask = None if pictures.mask is None else str(files.input(job_id, count))

    def keep(self) -> None:
        """Write the files. Runs in a thread."""
        mask = [] if self._pictures.mask is None else [self._pictures.mask]
        self._files.write_inputs(self._job_id, [*self._pictures.images, *mask])

    def remove(self) -> None:
        self._files.drop_inputs(self._job_id)


async def read_inputs(context: ServerContext, card: ModelCard, wanted: EditRequest) -> Pictures:
    """Every picture of a request, decoded; too many are refused before the first is read."""
    sources = [("image", source) for source in wanted.image or []]
    sources += [("url", source) for source in wanted.url or []]
    most = context.inputs.rules.image_count
    if not sources:
        raise RequestError(
            "An edit needs a picture.",
            hint="Send it as the file `image`, or its address as `url`.",
            code="missing_parameter",
            param="image",
        )
    if len(sources) > most:
        raise RequestError(
            f"An edit takes at most {most} pictures.", code="too_many_images", param="image"
        )
    if 0 < card.max_images < len(sources):
        raise RequestError(
            f"{card.name} takes at most {card.max_images}.",
            hint="Send fewer.",
            code="too_many_images",
            param="image",
        )
    for param, source in (*sources, ("mask", wanted.mask)):
        if param != "url" and isinstance(source, str):
            raise RequestError(
                f"{param} must be a file.",
                hint="An address goes into `url`.",
                code="file_expected",
                param=param,
            )
    images = [await context.inputs.picture(source, param=param) for param, source in sources]
    mask = None
    if wanted.mask is not None:
        mask = await context.inputs.picture(wanted.mask, param="mask")
        if mask.size != images[0].size:
            raise RequestError(
                f"The mask is {mask.width}x{mask.height}, "
                f"the picture {images[0].width}x{images[0].height}.",
                hint="They must be of one size.",
                code="invalid_mask",
                param="mask",
            )
    return Pictures(images, mask)
