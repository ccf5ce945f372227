"""What the routes answer with. The routes build plain dicts; these models describe them in
/openapi.json, and tests hold them against real answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """Every answer that is not a success."""

    error: ErrorFields
    detail: str


class Image(BaseModel):
    b64_json: str | None
    url: str | None
    revised_prompt: str | None


class ImageTokens(BaseModel):
    image_tokens: int
    text_tokens: int


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """In the words of two kinds of clients; only the images are counted."""

    input_tokens: int
    input_tokens_details: ImageTokens
    output_tokens: int
    total_tokens: int
    prompt_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens: int
    reasoning_tokens: int
    image_count: int


class Images(BaseModel):
    id: str
    created: int
    model: str
    data: list[Image]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    size: str = Field(pattern=r"^[0-9]+x[0-9]+$")
    seeds: list[int]
    inference_time_s: float
    peak_memory_mb: float
    usage: Usage
    quality: str = ""


class KeptImage(BaseModel):
    id: str
    object: Literal["image"]
    status: str
    model: str
    created_at: int
    expires_at: int | None
    prompt: str
    size: str = Field(pattern=r"^[0-9]+x[0-9]+$")
    output_format: Literal["png", "jpeg", "webp"]
    seeds: list[int]
    data: list[Image]


class KeptImages(BaseModel):
    object: Literal["list"]
    data: list[KeptImage]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Video(BaseModel):
    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    remixed_from_video_id: str | None
    seconds: str
    size: str = Field(pattern=r"^[0-9]+x[0-9]+$")
    error: dict[str, Any] | None
    url: str | None
    urls: list[str] | None
    fps: int
    num_frames: int
    num_outputs: int
    seed: int
    attempt: int
    queue_position: int | None = None
    eta_s: int | None = None
    state_detail: str | None = None
    preview_url: str | None = None
    inference_time_s: float = 0.0
    peak_memory_mb: float = 0.0


class Videos(BaseModel):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: str
    deleted: Literal[True]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    num_gpus: int
    task_type: str
    supported_task_types: list[str]
    dit_precision: str
    vae_precision: str
    pipeline_name: str
    pipeline_class: str
    edits: str
    max_images: int


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """Health and description routes: the fields that all of one kind have."""

    status: str
