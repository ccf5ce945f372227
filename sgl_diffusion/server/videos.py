"""The video routes: create, list, retrieve, delete, content."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sgl_diffusion.base.errors import ConflictError, NotFoundError, RequestError
from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.background import no_video
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.files import file_response
from sgl_diffusion.server.ids import is_id, new_id
from sgl_diffusion.server.images import resolve
from sgl_diffusion.server.media import VIDEO_TYPE
from sgl_diffusion.server.schemas import VideoRequest
from sgl_diffusion.server.validate import parse

router = APIRouter(prefix="/v1/videos")

KIND = "video"
_POLL_AFTER_MS = "500"
_MAX_PAGE = 100


@router.post("")
async def create(request: Request, context: Context) -> Response:
    context.check_open()
    body = await read_body(request, form=True)
    try:
        wanted = parse(VideoRequest, body)
    finally:
        await body.close()
    card = context.card()
    context.check_model(wanted.model, card)
    wish = wanted.wish(card)
    params = resolve(context, wish, video=True, by_size=wanted.size is not None)
    payload = {
        "params": asdict(params),
        "model": context.model_name(card),
        "quality": wanted.file_quality(),
    }
    row = JobRow(id=new_id(KIND), kind=KIND, payload=payload, created_at=time.time())
    await context.runner.add(row)
    return _respond(context, row)


@router.get("")
async def list_videos(
    context: Context, after: str | None = None, limit: str = "20", order: str = "desc"
) -> dict[str, Any]:
    count = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 9 else 0
    if not 1 <= count <= _MAX_PAGE:
        raise RequestError(
            f"limit must be a number from 1 to {_MAX_PAGE}.",
            code="out_of_range",
            param="limit",
        )
    rows = await _page(context, after, count + 1, order)
    data = [_describe(context, row) for row in rows[:count]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(rows) > count,
    }


@router.get("/{video_id}")
async def retrieve(context: Context, video_id: str) -> Response:
    return _respond(context, await _find(context, video_id))


@router.delete("/{video_id}")
async def delete(context: Context, video_id: str) -> dict[str, Any]:
    await _find(context, video_id)
    await context.runner.delete(video_id)
    return {"id": video_id, "object": "video.deleted", "deleted": True}


@router.api_route("/{video_id}/content", methods=["GET", "HEAD"])
async def content(
    request: Request, context: Context, video_id: str, variant: str = "video"
) -> Response:
    row = await _find(context, video_id)
    if variant not in ("video", "thumbnail", "spritesheet"):
        raise RequestError("variant must be video.", param="variant")
    if row.status == "failed":
        raise ConflictError(
            "The video failed.", hint="Its error field says why.", code="video_failed"
        )
    if row.status != "completed":
        raise ConflictError("The video is not ready yet.", code="video_not_ready")
    if variant != "video":
        raise NotFoundError(
            f"No {variant} was made.", code="variant_not_available", param="variant"
        )
    path = context.files.video(video_id)
    if not path.is_file():
        raise NotFoundError("The file of this video is gone.", code="video_expired")
    return file_response(request, path, VIDEO_TYPE)


async def _find(context: ServerContext, video_id: str) -> JobRow:
    row = await context.runner.jobs.get(video_id) if is_id(video_id, KIND) else None
    if row is None or row.kind != KIND:
        raise no_video()
    return row


async def _page(context: ServerContext, after: str | None, limit: int, order: str) -> list[JobRow]:
    direction: Literal["asc", "desc"]
    if order == "asc":
        direction = "asc"
    elif order == "desc":
        direction = "desc"
    else:
        raise RequestError("order must be asc or desc.", param="order")
    try:
        if after is not None:
            await _find(context, after)
        return await context.runner.jobs.list(KIND, after=after, limit=limit, order=direction)
    except NotFoundError:
        raise RequestError(
            "after is not the id of a video.", code="invalid_cursor", param="after"
        ) from None


def _respond(context: ServerContext, row: JobRow) -> Response:
    video = _describe(context, row)
    pending = video["status"] in ("queued", "in_progress")
    headers = {"openai-poll-after-ms": _POLL_AFTER_MS} if pending else {}
    return JSONResponse(video, headers=headers)


def _describe(context: ServerContext, row: JobRow) -> dict[str, Any]:
    """OpenAI's Video object with our further fields."""
    params = row.payload["params"]
    video: dict[str, Any] = {
        "id": row.id,
        "object": "video",
        "model": row.payload["model"],
        "status": row.status,
        "progress": row.progress,
        "created_at": int(row.created_at),
        "completed_at": None if row.completed_at is None else int(row.completed_at),
        "expires_at": None,
        "prompt": params["prompt"],
        "remixed_from_video_id": None,
        "seconds": str(round(params["num_frames"] / params["fps"])),
        "size": f"{params['width']}x{params['height']}",
        "error": row.error,
        "url": None,
        "fps": params["fps"],
        "num_frames": params["num_frames"],
        "seed": params["seeds"][0],
        "attempt": max(row.attempts, 1),
    }
    if row.status == "completed":
        base = (context.settings.public_base_url or "").rstrip("/")
        video["url"] = f"{base}/v1/videos/{row.id}/content"
        video["inference_time_s"] = round(sum(row.files[0]["seconds"].values()), 3)
    elif row.status != "failed":
        video |= _live(context, row)
    return video


def _live(context: ServerContext, row: JobRow) -> dict[str, Any]:
    """What only the running job knows. One that is done but not yet a file is at 99 percent."""
    snapshot = context.runner.snapshot(row.id)
    position = context.runner.position(row.id)
    if snapshot is None or snapshot.state == "queued":
        return {"status": "queued", "progress": 0, "queue_position": position}
    return {
        "status": "in_progress",
        "progress": min(snapshot.progress, 99),
        "attempt": snapshot.attempt,
        "state_detail": snapshot.phase or None,
    }
