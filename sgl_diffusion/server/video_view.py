"""How a row of the job table looks to clients: OpenAI's Video object with our further fields."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.background import no_video
from sgl_diffusion.server.context import ServerContext
from sgl_diffusion.server.ids import is_id

KIND = "video"
PENDING = ("queued", "in_progress")
_POLL_AFTER_MS = "500"


async def find_video(context: ServerContext, video_id: str) -> JobRow:
    row = await context.runner.jobs.get(video_id) if is_id(video_id, KIND) else None
    if row is None or row.kind != KIND:
        raise no_video()
    return row


def respond(context: ServerContext, row: JobRow) -> Response:
    video = describe(context, row)
    pending = video["status"] in PENDING
    headers = {"openai-poll-after-ms": _POLL_AFTER_MS} if pending else {}
    return JSONResponse(video, headers=headers)


def describe(context: ServerContext, row: JobRow) -> dict[str, Any]:
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
