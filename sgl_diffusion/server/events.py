"""GET /v1/videos/{id}/events: the progress of a video as server-sent events.

Each event has the Video object of that moment: `video.queued` and `video.in_progress` whenever
something a person can see has changed, `video.completed` or `video.failed` as the last one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.sse import PING, PING_SECONDS, EventStream, frame
from sgl_diffusion.server.video_view import PENDING, describe, find_video

router = APIRouter(prefix="/v1/videos")

_LOOK_SECONDS = 0.1


@router.get("/{video_id}/events")
async def events(context: Context, video_id: str) -> Response:
    await find_video(context, video_id)  # an unknown id is a 404, not a stream
    return EventStream(_follow(context, video_id))


async def _follow(context: ServerContext, video_id: str) -> AsyncIterator[bytes]:
    """Events until the video is over; one that is deleted meanwhile ends in an error event."""
    last: dict[str, Any] | None = None
    sent = time.monotonic()
    while True:
        context.check_open()
        video = describe(context, await find_video(context, video_id))
        if video != last:
            yield frame({"type": f"video.{video['status']}", "video": video})
            last, sent = video, time.monotonic()
        elif time.monotonic() - sent >= PING_SECONDS:
            yield PING
            sent = time.monotonic()
        if video["status"] not in PENDING:
            return
        await asyncio.sleep(_LOOK_SECONDS)
