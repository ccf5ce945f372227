"""The table of routes for /openapi.json: what each takes, gives, and refuses.

A test asks for a row for every route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sgl_diffusion.server.schemas import (
    EditRequest,
    ImageRequest,
    RemixRequest,
    VideoRequest,
    answers,
)
from sgl_diffusion.server.schemas.lora import MergeLora, SetLora, UnmergeLora
from sgl_diffusion.server.validate import RequestBody

Schema = dict[str, Any]
_OBJECT: Schema = {"type": "object"}
_ID = {"type": "string", "maxLength": 512}
_WHOLE = {"type": "string", "pattern": "^[0-9]{1,2}$"}
_LIMIT = {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
_ORDER = {"type": "string", "enum": ["asc", "desc"], "default": "desc"}
_FILES = ("image/png", "image/jpeg", "image/webp", "video/mp4")

_PAGE = (("after", _ID), ("limit", _LIMIT), ("order", _ORDER))
JSON, FORM = "application/json", "multipart/form-data"


@dataclass(frozen=True)
class Operation:
    """One method of one path: what it takes, what it gives on success, which errors are its own."""

    summary: str
    request: type[RequestBody] | None = None
    kinds: tuple[str, ...] = (JSON,)
    answer: type[BaseModel] | Schema | None = None
    media: tuple[str, ...] = ("application/json",)
    query: tuple[tuple[str, Schema], ...] = ()
    errors: tuple[int, ...] = ()
    public: bool = False


OPERATIONS: dict[str, Operation] = {
    "GET /livez": Operation(
        "200 while the server process answers.", answer=answers.Status, public=True
    ),
    "GET /liveness": Operation("The same under SGLang's name.", answer=answers.Status),
    "GET /readyz": Operation(
        "200 when a job would run now, else 503 with `status` and `reason`.",
        answer=answers.Status,
        public=True,
    ),
    "GET /health": Operation("The same as /readyz.", answer=answers.Status, public=True),
    "GET /health_generate": Operation(
        "200 when the smallest picture was really made, at most every five seconds.",
        answer=answers.Status,
    ),
    "GET /models": Operation(
        "The served model: path, precisions, tasks, defaults.", answer=_OBJECT
    ),
    "GET /model_info": Operation(
        "The same in the words of SGLang's clients, with every default and limit of a request.",
        answer=_OBJECT,
    ),
    "GET /v1/model_info": Operation("The model's path.", answer=_OBJECT),
    "GET /server_info": Operation(
        "The model's server: its options, sizes and state.", answer=_OBJECT
    ),
    "GET /stats": Operation(
        "State, uptime and the samples of /metrics as JSON.", answer=answers.Status
    ),
    "GET /metrics": Operation("Prometheus text; names begin with `sgld_`.", media=("text/plain",)),
    "GET /v1/models": Operation("OpenAI's list.", answer=answers.Models),
    "GET /v1/models/{model_id}": Operation(
        "One of the list; an id may hold slashes.", answer=answers.Model, errors=(404,)
    ),
    "DELETE /v1/models/{model_id}": Operation("Refused.", errors=(404,)),
    "POST /v1/images/generations": Operation(
        "Make images and wait for them, or watch them come.",
        ImageRequest,
        answer=answers.Images,
        media=("application/json", "text/event-stream"),
        errors=(404,),
    ),
    "GET /v1/images/{image_id}/content": Operation(
        "A kept image; `variant` counts from 0.",
        media=_FILES[:3],
        query=(("variant", _WHOLE),),
        errors=(400, 404, 416),
    ),
    "POST /v1/videos": Operation(
        "Queue a video.", VideoRequest, kinds=(JSON, FORM), answer=answers.Video, errors=(404,)
    ),
    "POST /v1/images/edits": Operation(
        "Make images from pictures.",
        EditRequest,
        kinds=(FORM,),
        answer=answers.Images,
        media=("application/json", "text/event-stream"),
        errors=(404,),
    ),
    "GET /v1/images": Operation(
        "List kept images.", answer=answers.KeptImages, query=_PAGE, errors=(400,)
    ),
    "GET /v1/images/{image_id}": Operation(
        "What is known of a kept image.", answer=answers.KeptImage, errors=(404, 405)
    ),
    "DELETE /v1/images/{image_id}": Operation(
        "Forget it and its files.", answer=answers.Deleted, errors=(404, 405)
    ),
    "GET /v1/videos": Operation(
        "List videos.",
        answer=answers.Videos,
        query=_PAGE,
        errors=(400,),
    ),
    "GET /v1/videos/{video_id}": Operation(
        "State and progress.", answer=answers.Video, errors=(404,)
    ),
    "DELETE /v1/videos/{video_id}": Operation(
        "Cancel it if it runs, forget it and its files.", answer=answers.Deleted, errors=(404,)
    ),
    "GET /v1/videos/{video_id}/content": Operation(
        "The mp4; `thumbnail` (WebP) and `spritesheet` (JPEG, 25 frames) are made with it.",
        media=("video/mp4", "image/jpeg", "image/webp"),
        query=(
            ("variant", {"type": "string", "enum": ["video", "thumbnail", "spritesheet"]}),
            ("index", _WHOLE),
        ),
        errors=(400, 404, 409, 416),
    ),
    "GET /v1/videos/{video_id}/preview": Operation(
        "The newest picture (JPEG) of a video that is being made with `partial_images`.",
        media=("image/jpeg",),
        query=(("step", {"type": "string", "pattern": "^[0-9]{1,4}$"}),),
        errors=(400, 404),
    ),
    "GET /v1/videos/{video_id}/events": Operation(
        "Its progress as server-sent events.", media=("text/event-stream",), errors=(404,)
    ),
    "POST /v1/videos/{video_id}/remix": Operation(
        "The settings and seeds of a completed video with another prompt.",
        RemixRequest,
        answer=answers.Video,
        errors=(404, 409),
    ),
    "POST /v1/set_lora": Operation(
        "Replace the adapters that every job gets ([below](#adapters)).",
        SetLora,
        answer=answers.Status,
        errors=(404, 409),
    ),
    "POST /v1/merge_lora_weights": Operation(
        "Put that set back into use.", MergeLora, answer=answers.Status, errors=(404, 409)
    ),
    "POST /v1/unmerge_lora_weights": Operation(
        "Take that set out of use.", UnmergeLora, answer=answers.Status, errors=(404, 409)
    ),
    "GET /v1/list_loras": Operation(
        "Adapters that are loaded, adapters in use, changes that wait.", answer=_OBJECT
    ),
    "DELETE /v1/loras/{nickname}": Operation(
        "Forget an adapter by its nickname.", answer=_OBJECT, errors=(400, 404, 409)
    ),
    "POST /start_profile": Operation(
        "For the admin: begin to record what workers and server do.",
        answer=answers.Status,
        errors=(409,),
    ),
    "POST /stop_profile": Operation(
        "For the admin: the record, as a file for ui.perfetto.dev.", answer=_OBJECT, errors=(409,)
    ),
    "POST /v1/images/variations": Operation("Not supported.", errors=(404,)),
    "POST /v1/videos/edits": Operation("Not supported.", errors=(404,)),
    "POST /v1/videos/extensions": Operation("Not supported.", errors=(404,)),
    "POST /v1/videos/characters": Operation("Not supported.", errors=(404,)),
    "GET /v1/videos/characters/{character_id}": Operation("Not supported.", errors=(404,)),
    "GET /openapi.json": Operation("This document.", answer=_OBJECT),
}
# Paths that answer with an error only; their success is not described.
REFUSED = frozenset(
    key for key, row in OPERATIONS.items() if row.summary in ("Refused.", "Not supported.")
)
