"""POST /v1/images/generations and POST /v1/images/edits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.base.params import ResolvedParams, SamplingParams
from sgl_diffusion.client.types import partial_of
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.edit_inputs import EditInputs, read_inputs
from sgl_diffusion.server.ids import new_id
from sgl_diffusion.server.image_job import KIND, ImageJob
from sgl_diffusion.server.schemas import EditRequest, ImageRequest
from sgl_diffusion.server.sse import PING, EventStream, frame, with_pings
from sgl_diffusion.server.validate import parse

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Generation, GenerationHandle

router = APIRouter(prefix="/v1/images")

_CLIENT_GONE = 499


@router.post("/generations")
async def generate(request: Request, context: Context) -> Response:
    context.check_open()
    wanted = parse(ImageRequest, await read_body(request, form=False))
    context.check_model(wanted.model, context.card())
    params = resolve(context, wanted.wish(), video=False, by_size=wanted.size is not None)
    model = context.model_name(context.card())
    job = ImageJob(context, new_id(KIND), wanted, params, model, "image_generation")
    return await _run(request, job)


@router.post("/edits")
async def edit(request: Request, context: Context) -> Response:
    context.check_open()
    body = await read_body(request, form=True)
    try:
        if body.form is None:
            raise RequestError(
                "Edits are sent as a form.",
                hint="Send multipart/form-data.",
                code="unsupported_media_type",
            )
        wanted = parse(EditRequest, body)
        card = context.card()
        context.check_model(wanted.model, card)
        pictures = await read_inputs(context, card, wanted)
    finally:
        await body.close()
    image_id = new_id(KIND)
    inputs = EditInputs(context.files, image_id, pictures)
    wish = wanted.edit_wish(card, pictures.size, inputs.images, inputs.mask)
    params = resolve(context, wish, video=False, by_size=wanted.size is not None)
    job = ImageJob(context, image_id, wanted, params, context.model_name(card), "image_edit")
    try:
        await context.in_thread(inputs.keep)
        return await _run(request, job, inputs)
    except BaseException:
        inputs.remove()
        raise


@router.post("/variations")
async def variations() -> None:
    raise NotFoundError(
        "There are no variations.",
        hint="Use /v1/images/edits with a strength.",
        code="not_supported",
    )


def resolve(
    context: ServerContext, wish: SamplingParams, *, video: bool, by_size: bool
) -> ResolvedParams:
    """The client's answer to a wish; a wrong edge is blamed on `size` where that was sent."""
    try:
        return context.client.resolve(wish, video=video)
    except RequestError as error:
        if by_size and error.code == "invalid_size":
            error.param = "size"
        if error.param == "images" and not video:
            error.param = "image"
        raise


async def _run(request: Request, job: ImageJob, inputs: EditInputs | None = None) -> Response:
    """Submit and answer. The input files go when the job is over, in the stream's own time."""
    context = job.context
    handle = await context.client.submit(
        job.params, job_id=job.id, deadline=context.settings.request_timeout
    )

    def close() -> None:
        handle.cancel()  # does nothing to a job that has ended
        if inputs is not None:
            inputs.remove()

    if job.wanted.stream:
        return EventStream(_events(job, handle), close)
    try:
        generation = await _result_while_connected(request, handle)
        if generation is None:
            return Response(status_code=_CLIENT_GONE)
        return await job.respond(generation)
    finally:
        close()


async def _events(job: ImageJob, handle: GenerationHandle) -> AsyncIterator[bytes]:
    """Partial pictures as they come, then every finished one."""
    shown: set[tuple[int, int]] = set()
    async for event in with_pings(handle.events()):
        part = None if event is None else partial_of(event)
        if event is None:
            yield PING
        elif part is not None and (part.row, part.index) not in shown:
            shown.add((part.row, part.index))  # a worker that died shows them once more
            yield frame(await job.partial(part.index, part.row, part.picture))
    for index, entry in enumerate(await job.finish(await handle.result())):
        yield frame(job.completed(index, entry))


async def _result_while_connected(request: Request, handle: GenerationHandle) -> Generation | None:
    """The result, or None when the client went away."""
    result = asyncio.ensure_future(handle.result())
    # The body is read, so the next message can only be the end of the connection.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await result if result.done() else None
    finally:
        for task in (result, gone):
            task.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)
