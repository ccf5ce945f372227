"""The video routes: create, list, retrieve, delete."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.base.params import ResolvedParams, SamplingParams
from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.ids import new_id
from sgl_diffusion.server.images import resolve
from sgl_diffusion.server.lora import loras_of
from sgl_diffusion.server.pages import Page, page_of
from sgl_diffusion.server.repeats import Origin, origin_of
from sgl_diffusion.server.rows import find_row, visible_to
from sgl_diffusion.server.schemas import VideoRequest
from sgl_diffusion.server.validate import parse
from sgl_diffusion.server.video_view import KIND, describe, find_video, respond

router = APIRouter(prefix="/v1/videos")


@router.post("")
async def create(request: Request, context: Context) -> Response:
    context.check_open()
    body = await read_body(request, form=True)
    try:
        origin = await origin_of(request, body)
        wanted = parse(VideoRequest, body)
        card = context.card()
        adapter = context.check_model(wanted.model, card)
        video_id = new_id(KIND)
        wish = replace(wanted.wish(card), loras=loras_of(request, context, wanted, adapter))
        reference = wanted.reference()
        if reference is None:
            params = resolve(context, wish, video=True, by_size=wanted.size is not None)
        else:
            params = await _with_picture(context, video_id, wanted, wish, reference)
    finally:
        await body.close()
    how = {"quality": wanted.file_quality(), "preset": wanted.x264_preset}
    return await start(context, origin, video_id, params, how)


async def _with_picture(
    context: ServerContext,
    video_id: str,
    wanted: VideoRequest,
    wish: SamplingParams,
    reference: tuple[str, Any],
) -> ResolvedParams:
    """Keep the picture of a request and resolve its wish with it."""
    param, source = reference
    wish = replace(wish, images=(str(context.files.input(video_id, 0)),))
    by_size = wanted.size is not None
    try:
        resolve(context, wish, video=True, by_size=by_size)  # nothing is fetched for nothing
    except RequestError as error:
        if error.param == "images":
            error.param = param.partition(".")[0]
        raise
    picture = await context.inputs.picture(source, param=param)
    if wanted.edges() == (None, None):
        width, height = context.card().size_like(picture.width, picture.height)
        wish = replace(wish, width=width, height=height)
    params = resolve(context, wish, video=True, by_size=by_size)
    await context.in_thread(partial(context.files.write_inputs, video_id, [picture]))
    return params


@router.get("")
async def list_videos(
    request: Request,
    context: Context,
    after: str | None = None,
    limit: str = "20",
    order: str = "desc",
) -> dict[str, Any]:
    page, owner = Page.of(after, limit, order), visible_to(request)
    if after is not None:
        try:
            await find_row(context, KIND, after, owner)
        except NotFoundError:
            raise page.unknown() from None
    rows = await page.rows(context.jobs, KIND, owner)
    return page_of([describe(context, row) for row in rows], page)


@router.get("/{video_id}")
async def retrieve(context: Context, video_id: str) -> Response:
    return respond(context, await find_video(context, video_id))


@router.delete("/{video_id}")
async def delete(context: Context, video_id: str) -> dict[str, Any]:
    await find_video(context, video_id)
    await context.runner.delete(video_id)
    return {"id": video_id, "object": "video.deleted", "deleted": True}


async def start(
    context: ServerContext,
    origin: Origin,
    video_id: str,
    params: ResolvedParams,
    how: dict[str, Any],
) -> Response:
    """Commit a video job and answer with its object. `how` is what the files are made with; a job
    that is refused, or was made before, leaves no input pictures behind."""
    model = context.model_name(context.card())
    stored = None
    try:
        params = replace(params, loras=await context.client.loras.prepare(params.loras))
        row = JobRow(
            id=video_id,
            kind=KIND,
            payload={"params": asdict(params), "model": model, **how},
            seeds=list(params.seeds),
            adapters=[asdict(use) for use in params.loras] or context.client.loras.active(),
        )
        stored = await context.runner.add(row, origin)
    finally:
        if stored is None or stored.id != video_id:
            context.files.drop_inputs(video_id)
    return respond(context, stored)
