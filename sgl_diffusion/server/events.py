"""GET /v1/videos/{id}/events: the progress of a video as server-sent events.

Each event has the Video object of that moment: `video.queued` and `video.in_progress` whenever
something a person can see has changed, `video.completed` or `video.failed` as the last one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response, StreamingResponse

from sgl_diffusion.base.errors import SglError
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.errors import envelope, status_of
from sgl_diffusion.server.video_view import PENDING, describe, find_video

router = APIRouter(prefix="/v1/videos")

_LOOK_SECONDS = 0.1
_PING_SECONDS = 15.0
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@router.get("/{video_id}/events")
async def events(context: Context, video_id: str) -> Response:
    await find_video(context, video_id)  # an unknown id is a 404, not a stream
    return StreamingResponse(
        _follow(context, video_id), media_type="text/event-stream", headers=_HEADERS
    )


async def _follow(context: ServerContext, video_id: str) -> AsyncIterator[bytes]:
    """Events until the video is over. A video that is deleted meanwhile ends in an error event."""
    last: dict[str, Any] | None = None
    sent = time.monotonic()
    while True:
        try:
            context.check_open()
            video = describe(context, await find_video(context, video_id))
        except SglError as error:
            yield _frame("error", envelope(status_of(error), str(error), error.code, error.param))
            return
        if video != last:
            kind = f"video.{video['status']}"
            yield _frame(kind, {"type": kind, "video": video})
            last, sent = video, time.monotonic()
        elif time.monotonic() - sent >= _PING_SECONDS:
            yield b": ping\n\n"
            sent = time.monotonic()
        if video["status"] not in PENDING:
            return
        await asyncio.sleep(_LOOK_SECONDS)


def _frame(event: str, data: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
