"""GET and HEAD of a video's files (mp4, thumbnail, sheet of frames) and of its preview."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.server.context import Context
from sgl_diffusion.server.media import VIDEO_VARIANTS
from sgl_diffusion.server.sendfile import file_response
from sgl_diffusion.server.video_view import completed, find_video

router = APIRouter(prefix="/v1/videos")

_WAITING = "Ask for some with partial_images; its events say when one is there."
_NO_PREVIEW = {
    "queued": _WAITING,
    "in_progress": _WAITING,
    "completed": "It is finished: GET content?variant=thumbnail.",
    "failed": "It failed; its error field says why.",
}


@router.api_route("/{video_id}/content", methods=["GET", "HEAD"])
async def content(
    request: Request,
    context: Context,
    video_id: str,
    variant: str = "video",
    index: str = "0",
) -> Response:
    row = await find_video(context, video_id)
    if variant not in VIDEO_VARIANTS:
        raise RequestError(f"variant must be {', '.join(VIDEO_VARIANTS)}.", param="variant")
    if not (index.isascii() and index.isdigit() and len(index) <= 2):
        raise RequestError("index is the number of an output, from 0.", param="index")
    completed(row)
    if int(index) >= len(row.payload["params"]["seeds"]):
        raise NotFoundError(
            "The job has fewer outputs.", code="variant_not_available", param="index"
        )
    path = context.files.video(video_id, int(index), variant)
    try:
        return await file_response(request, path, VIDEO_VARIANTS[variant][1])
    except FileNotFoundError:
        entry = next((entry for entry in row.files if entry["name"] == path.name), {})
        url = context.redirect_url(entry)
        if url is not None:
            return RedirectResponse(url, status_code=302)
        await context.check_here(video_id)
        raise NotFoundError("The file of this video is gone.", code="video_expired") from None


@router.api_route("/{video_id}/preview", methods=["GET", "HEAD"])
async def preview(context: Context, video_id: str, step: str = "0") -> Response:
    """The newest picture. `step` only gives each picture an address of its own."""
    row = await find_video(context, video_id)
    if not (step.isascii() and step.isdigit() and len(step) <= 4):
        raise RequestError("step is the number of a step.", param="step")
    found = context.runner.preview(video_id)
    if found is None:
        raise NotFoundError(
            "There is no preview of this video.",
            hint=_NO_PREVIEW[row.status],
            code="variant_not_available",
        )
    return Response(found.data, media_type="image/jpeg", headers={"cache-control": "no-store"})
