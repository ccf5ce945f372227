"""How a row of the job table looks to clients: OpenAI's Video object with our further fields."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from sgl_diffusion.base.errors import ConflictError
from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.context import ServerContext
from sgl_diffusion.server.rows import find_row

KIND = "video"
PENDING = ("queued", "in_progress")
_POLL_AFTER_MS = "500"


async def find_video(context: ServerContext, video_id: str) -> JobRow:
    return await find_row(context, KIND, video_id)


def completed(row: JobRow) -> None:
    """ConflictError for a video that has no files, or not yet."""
    if row.status == "failed":
        raise ConflictError(
            "The video failed.", hint="Its error field says why.", code="video_failed"
        )
    if row.status != "completed":
        raise ConflictError("The video is not ready yet.", code="video_not_ready")


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
        "expires_at": None if row.expires_at is None else int(row.expires_at),
        "prompt": params["prompt"],
        "remixed_from_video_id": row.payload.get("remixed_from"),
        "seconds": str(max(round(params["num_frames"] / params["fps"]), 1)),
        "size": f"{params['width']}x{params['height']}",
        "error": row.error,
        "url": None,
        "urls": None,
        "fps": params["fps"],
        "num_frames": params["num_frames"],
        "num_outputs": len(params["seeds"]),
        "seed": params["seeds"][0],
        "attempt": max(row.attempts, 1),
    }
    if row.status == "completed":
        video["urls"] = _urls(context, row)
        video["url"] = video["urls"][0]
        video["inference_time_s"] = round(sum(row.files[0]["seconds"].values()), 3)
        video["peak_memory_mb"] = row.files[0].get("peak_memory_mb", 0.0)
    elif row.status != "failed":
        video |= _live(context, row)
    return video


def _urls(context: ServerContext, row: JobRow) -> list[str]:
    """Where the mp4 of each output is: in the bucket as soon as it is there, else here."""
    base = (context.settings.public_base_url or "").rstrip("/")
    content = f"{base}/v1/videos/{row.id}/content"
    count = len(row.payload["params"]["seeds"])
    here = [f"{content}?index={index}" if index else content for index in range(count)]
    return [
        context.remote_url(entry) or url for entry, url in zip(row.files[:count], here, strict=True)
    ]


def _live(context: ServerContext, row: JobRow) -> dict[str, Any]:
    """What only the running job knows. One that is done but not yet a file is at 99 percent."""
    snapshot = context.runner.snapshot(row.id)
    position = context.runner.position(row.id)
    if snapshot is None and row.status == "in_progress" and context.jobs.shared:
        return {}  # it runs on another server, which keeps the row up to date
    if snapshot is None or snapshot.state == "queued":
        ahead = 0 if position is None else position
        charged = 1 if snapshot is None else snapshot.attempt
        return {
            "attempt": max(row.attempts, charged),
            "status": "queued",
            "progress": 0,
            "queue_position": position,
            "eta_s": context.admission.eta(KIND, ahead + 1),
        }
    preview = context.runner.preview(row.id)
    base = (context.settings.public_base_url or "").rstrip("/")
    return {
        "status": "in_progress",
        "progress": min(snapshot.progress, 99),
        "attempt": snapshot.attempt,
        "state_detail": snapshot.phase or None,
        "eta_s": context.admission.eta(KIND, 1 - snapshot.progress / 100),
        "preview_url": preview and f"{base}/v1/videos/{row.id}/preview?step={preview.step}",
    }
