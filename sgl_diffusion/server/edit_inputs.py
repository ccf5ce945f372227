"""The pictures of an edit: read through the guards, and put down again for the worker."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import ModelCard
from sgl_diffusion.server.context import ServerContext
from sgl_diffusion.server.schemas import EditRequest

if TYPE_CHECKING:
    from PIL.Image import Image


class EditInputs:
    """The pictures of one job, each put down as soon as it is decoded: many large ones are never
    in memory together. `taken` as soon as somebody sees to it that they go with the job."""

    def __init__(self, context: ServerContext, job_id: str) -> None:
        self._context, self._job_id = context, job_id
        self.images: tuple[str, ...] = ()
        self.mask: str | None = None
        self.size = (0, 0)  # of the first picture
        self.taken = False

    async def read(self, card: ModelCard, wanted: EditRequest) -> None:
        """Read every picture of a request through the guards."""
        self._context.keeper.check()
        sources = _sources(self._context, card, wanted)
        for index, (param, source) in enumerate(sources):
            picture = await self._context.inputs.picture(source, param=param)
            if index == 0:
                self.size = picture.size
            self.images += (await self._keep(index, picture),)
        if wanted.mask is not None:
            mask = await self._context.inputs.picture(wanted.mask, param="mask")
            self._check_mask(mask.size)
            self.mask = await self._keep(len(sources), mask)

    def remove(self) -> None:
        self._context.files.drop_inputs(self._job_id)

    async def _keep(self, index: int, picture: Image) -> str:
        files = self._context.files
        await self._context.in_thread(partial(files.write_input, self._job_id, index, picture))
        return str(files.input(self._job_id, index))

    def _check_mask(self, size: tuple[int, int]) -> None:
        if size != self.size:
            raise RequestError(
                f"The mask is {size[0]}x{size[1]}, the picture {self.size[0]}x{self.size[1]}.",
                hint="They must be of one size.",
                code="invalid_mask",
                param="mask",
            )


def _sources(context: ServerContext, card: ModelCard, wanted: EditRequest) -> list[tuple[str, Any]]:
    """Where the pictures are; too many are refused before the first is read."""
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
    return sources
