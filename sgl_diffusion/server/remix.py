"""POST /v1/videos/{id}/remix, and what OpenAI has beside it and this server has not."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_diffusion.base.errors import ConflictError, NotFoundError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.context import Context
from sgl_diffusion.server.ids import new_id
from sgl_diffusion.server.repeats import origin_of
from sgl_diffusion.server.schemas import RemixRequest
from sgl_diffusion.server.validate import parse
from sgl_diffusion.server.video_view import KIND, find_video
from sgl_diffusion.server.videos import start

router = APIRouter(prefix="/v1/videos")


@router.post("/edits")
@router.post("/extensions")
@router.post("/characters")
@router.get("/characters/{character_id}")
async def not_supported() -> Response:
    raise NotFoundError(
        "This server does not edit or extend finished videos and knows no characters.",
        hint="POST /v1/videos/{id}/remix makes a video again with another prompt.",
        code="not_supported",
    )


@router.post("/{video_id}/remix")
async def remix(request: Request, context: Context, video_id: str) -> Response:
    """The settings, seeds and pictures of a completed video, with another prompt."""
    context.check_open()
    body = await read_body(request, form=False)
    origin = await origin_of(request, body)
    wanted = parse(RemixRequest, body)
    row = await find_video(context, video_id)
    if row.status != "completed":
        raise ConflictError(
            "Only a completed video can be remixed.",
            hint="GET /v1/videos/{id} says how far it is.",
            code="video_not_completed",
            param="video_id",
        )
    wish = _wish(row.payload["params"], wanted.prompt)
    video_id = new_id(KIND)
    sources = wish.images
    pictures = tuple(str(context.files.input(video_id, i)) for i in range(len(sources)))
    params = context.client.resolve(replace(wish, images=pictures), video=True)
    if sources:
        await context.in_thread(partial(context.files.copy_inputs, row.id, video_id))
    how = {"quality": row.payload["quality"], "preset": row.payload.get("preset", "fast")}
    return await start(context, origin, video_id, params, {**how, "remixed_from": row.id})


def _wish(params: dict[str, Any], prompt: str) -> SamplingParams:
    """What to ask for to get `params` again; the model that is served now checks it anew."""
    names = {field.name for field in fields(SamplingParams)}
    same = {name: value for name, value in params.items() if name in names}
    seeds = params["seeds"]
    return msgspec.convert(
        {**same, "prompt": prompt, "num_outputs": len(seeds), "seed": seeds}, SamplingParams
    )
