"""POST /v1/images/generations and GET /v1/images/{id}/content."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.base.params import ResolvedParams, SamplingParams
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.files import write_file
from sgl_diffusion.server.ids import is_id, new_id
from sgl_diffusion.server.lora import loras_of
from sgl_diffusion.server.media import encode_image
from sgl_diffusion.server.metadata import settings_text
from sgl_diffusion.server.schemas import ImageRequest
from sgl_diffusion.server.sendfile import file_response
from sgl_diffusion.server.validate import parse

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Generation, GenerationHandle

router = APIRouter()

_ECHOED = ("low", "medium", "high", "xhigh", "max")  # what the OpenAI SDK can read back
_CLIENT_GONE = 499


@router.post("/v1/images/generations")
async def generate(request: Request, context: Context) -> Response:
    context.check_open()
    wanted = parse(ImageRequest, await read_body(request, form=False))
    adapter = context.check_model(wanted.model, context.card())
    wish = replace(wanted.wish(), loras=loras_of(request, context, wanted, adapter))
    params = resolve(context, wish, video=False, by_size=wanted.size is not None)
    image_id = new_id("image")
    handle = await context.client.submit(
        params, job_id=image_id, deadline=context.settings.request_timeout
    )
    generation = await _result_while_connected(request, handle)
    if generation is None:
        return Response(status_code=_CLIENT_GONE)
    data = await _encode(context, image_id, wanted, generation)
    return JSONResponse(_answer(context, image_id, wanted, generation, data))


@router.api_route("/v1/images/{image_id}/content", methods=["GET", "HEAD"])
async def content(
    request: Request, context: Context, image_id: str, variant: str = "0"
) -> Response:
    if not is_id(image_id, "image"):
        raise _no_image()
    if not (variant.isascii() and variant.isdigit() and len(variant) <= 2):
        raise RequestError("variant is the number of an image.", param="variant")
    found = context.files.find_image(image_id, int(variant))
    if found is None:
        if context.files.find_image(image_id, 0) is None:
            raise _no_image()
        raise NotFoundError(
            "There are fewer images.", code="variant_not_available", param="variant"
        )
    return await file_response(request, *found)


def resolve(
    context: ServerContext, wish: SamplingParams, *, video: bool, by_size: bool
) -> ResolvedParams:
    """The client's answer to a wish; a wrong edge is blamed on `size` where that was sent."""
    try:
        return context.client.resolve(wish, video=video)
    except RequestError as error:
        if by_size and error.code == "invalid_size":
            error.param = "size"
        raise


async def _result_while_connected(request: Request, handle: GenerationHandle) -> Generation | None:
    """The result, or None when the client went away; then the job is cancelled."""
    result = asyncio.ensure_future(handle.result())
    # The body is read, so the next message can only be the end of the connection.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await result if result.done() else None
    finally:
        handle.cancel()  # does nothing to a job that has ended
        for task in (result, gone):
            task.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)


async def _encode(
    context: ServerContext, image_id: str, wanted: ImageRequest, generation: Generation
) -> list[dict[str, Any]]:
    """One entry per image; those that get a URL are written to disk first."""
    kind, quality = wanted.output_format, wanted.file_quality()
    base = (context.settings.public_base_url or "").rstrip("/")
    data = []
    for index, clip in enumerate(generation.clips):
        settings = None
        if context.settings.metadata:
            name = context.model_name(context.card())
            settings = settings_text(generation.params, name, index)
        encoded = await context.in_thread(partial(encode_image, clip[0], kind, quality, settings))
        entry: dict[str, Any] = {"b64_json": None, "url": None, "revised_prompt": None}
        if wanted.response_format != "url":
            entry["b64_json"] = base64.b64encode(encoded).decode()
        if wanted.response_format != "b64_json":
            path = context.files.image(image_id, index, kind)
            await context.in_thread(partial(write_file, path, partial(_put, encoded)))
            variant = f"?variant={index}" if len(generation.clips) > 1 else ""
            entry["url"] = f"{base}/v1/images/{image_id}/content{variant}"
        data.append(entry)
    return data


def _put(encoded: bytes, path: Any) -> None:
    path.write_bytes(encoded)


def _answer(
    context: ServerContext,
    image_id: str,
    wanted: ImageRequest,
    generation: Generation,
    data: list[dict[str, Any]],
) -> dict[str, Any]:
    params = generation.params
    answer = {
        "id": image_id,
        "created": int(time.time()),
        "model": context.model_name(context.card()),
        "data": data,
        "background": "opaque",
        "output_format": wanted.output_format,
        "size": f"{params.width}x{params.height}",
        "seeds": list(params.seeds),
        "inference_time_s": round(sum(generation.seconds.values()), 3),
    }
    if wanted.quality in _ECHOED:
        answer["quality"] = wanted.quality
    return answer


def _no_image() -> NotFoundError:
    return NotFoundError(
        "There is no such image.",
        hint="Only images asked for with a URL are kept.",
        code="image_not_found",
        param="image_id",
    )
