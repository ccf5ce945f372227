"""Health, and what is served: /health /livez /readyz /models /model_info /server_info /stats."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from sgl_diffusion import __version__
from sgl_diffusion.base.errors import BusyError, NotFoundError, RequestError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.errors import envelope

log = get_logger(__name__)

router = APIRouter()

_GET = ["GET", "HEAD"]  # pollers like the shorter answer


async def _shown_path(request: Request, context: Context) -> str:
    return _path_for(request, context)


def _path_for(request: Request, context: ServerContext) -> str:
    """Where the model lies is for admins; other keys learn the name under which it is served."""
    card = context.card()
    return card.path if request.state.caller.admin else context.model_name(card)


ShownPath = Annotated[str, Depends(_shown_path)]


@router.api_route("/liveness", methods=_GET)
@router.api_route("/livez", methods=_GET)
async def livez() -> dict[str, str]:
    """The event loop answers; says nothing about the worker."""
    return {"status": "ok"}


@router.api_route("/health", methods=_GET)
@router.api_route("/readyz", methods=_GET)
async def readyz(context: Context) -> Response:
    """200 when a job would run now. Only a change is logged: pollers ask every second."""
    illness = _illness(context)
    state, reason = illness[:2] if illness else ("ready", "")
    if state != context.readiness:
        context.readiness = state
        log.info("readiness", extra={"fields": {"state": state, "reason": reason or None}})
    if illness is not None:
        return _unhealthy(context, *illness)
    restarts = context.client.health().restarts
    return JSONResponse({"status": "ok", "running": True, "restarts": restarts})


def _illness(context: ServerContext) -> tuple[str, str, str] | None:
    """State, reason and code of what keeps jobs from running now."""
    health = context.client.health()
    if context.draining:
        return "draining", "The server is draining.", "draining"
    if not health.ready:
        return health.state, health.reason or f"The server is {health.state}.", "not_ready"
    if full := context.keeper.low():
        return "disk_full", full, "insufficient_storage"
    return None


@router.get("/health_generate")
async def health_generate(context: Context) -> Response:
    """200 when the smallest picture was made just now. A full queue is 429: that is no illness."""
    if context.draining:
        return _unhealthy(context, "draining", "The server is draining.", "draining")
    finding = await context.probe.ask()
    if finding.error is None:
        seconds = round(finding.seconds, 3)
        return JSONResponse({"status": "ok", "running": True, "inference_time_s": seconds})
    if isinstance(finding.error, BusyError):
        raise finding.error
    return _unhealthy(context, "unhealthy", str(finding.error), finding.error.code)


def _unhealthy(context: ServerContext, state: str, reason: str, code: str) -> Response:
    body = envelope(503, reason, code)
    restarts = context.client.health().restarts
    body |= {"status": state, "running": False, "reason": reason, "restarts": restarts}
    return JSONResponse(body, status_code=503, headers={"retry-after": "1"})


@router.get("/models")
async def served(context: Context, path: ShownPath) -> dict[str, Any]:
    """SGLang's description of the one served model; OpenAI's list is /v1/models."""
    card = context.card()
    return {
        "model_path": path,
        "served_model_name": context.model_name(card),
        "num_gpus": context.settings.num_gpus,
        "task_type": card.tasks[0],
        "supported_task_types": list(card.tasks),
        "dit_precision": card.dit_precision,
        "vae_precision": card.vae_precision,
        "vae_decode_precision": card.vae_precision,
        "text_encoder_precision": card.text_encoder_precision,
        "pipeline_name": card.family,
        "pipeline_class": card.pipeline_class,
        "backend": card.backend,
        "attention_backend": card.attention_backend,
        "device": card.device,
        "defaults": {
            "size": f"{card.defaults.width}x{card.defaults.height}",
            "num_frames": card.defaults.num_frames,
            "fps": card.defaults.fps,
            "num_inference_steps": card.defaults.num_inference_steps,
            "guidance_scale": card.defaults.guidance_scale,
        },
        "note": card.note,
    }


@router.get("/model_info")
async def model_info(context: Context, path: ShownPath) -> dict[str, Any]:
    """What kind of model it is, in SGLang's words."""
    card = context.card()
    kinds = {"V": "video", "I": "image"}
    outputs = list(dict.fromkeys(kinds[task[-1]] for task in card.tasks if task[-1] in kinds))
    return {
        "model_path": path,
        "is_generation": True,
        "model_type": "diffusion",
        "architectures": [card.pipeline_class],
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "task_type": card.tasks[0],
        "supported_task_types": list(card.tasks),
        "output_types": outputs,
        "is_image_gen": "image" in outputs,
        "family": card.family,
        "backend": card.backend,
        "defaults": {
            name: value
            for name, value in dataclasses.asdict(card.defaults).items()
            if value is not None
        },
        "size_multiple": card.size_multiple,
        "frame_multiple": card.frame_multiple,
        "max_edge": card.max_edge,
        "max_frames": card.max_frames,
        "min_images": card.min_images,
        "max_images": card.max_images,
        "edits": card.edits,
        "masks": card.masks,
        "previews": card.previews,
        "note": card.note,
    }


@router.get("/v1/model_info")
async def model_path(path: ShownPath) -> dict[str, Any]:
    return {"model_path": path}


@router.get("/server_info")
async def server_info(context: Context, path: ShownPath) -> dict[str, Any]:
    card = context.card()
    return {
        "model_path": path,
        "served_model_name": context.model_name(card),
        "tp_size": 1,
        "dp_size": context.settings.dp_size,
        "num_gpus": context.settings.num_gpus,
        "offload": [dataclasses.asdict(part) for part in card.offload],
        "tile_edge": 0 if card.footprint is None else card.footprint.tile_edge,
        "version": __version__,
    }


@router.get("/stats")
async def stats(request: Request, context: Context) -> dict[str, Any]:
    """The samples of /metrics as JSON, without buckets, for people with curl."""
    health = context.client.health()
    loaded = context.client.card() is not None
    return {
        "status": "draining" if context.draining else health.state,
        "model_path": _path_for(request, context) if loaded else None,
        "uptime_s": int(time.time()) - context.started_at,
        "restarts": health.restarts,
        "lora": {
            key: value
            for key, value in context.client.loras.known().items()
            if key in ("state", "active", "waiting_changes", "waiting_jobs", "jobs_ahead")
        },
        "samples": [
            {"name": sample.name, "labels": sample.labels, "value": sample.value}
            for sample in context.samples()
            if not sample.name.endswith("_bucket")
        ],
    }


@router.get("/v1/models")
async def list_models(context: Context, path: ShownPath) -> dict[str, Any]:
    adapters = [_adapter(context, known) for known in _adapters(context)]
    return {"object": "list", "data": [_model(context, path), *adapters]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(context: Context, path: ShownPath, model_id: str) -> dict[str, Any]:
    nickname = context.check_model(model_id, context.card())
    if nickname is None:
        return _model(context, path)
    for known in _adapters(context):
        if known["nickname"] == nickname:
            return _adapter(context, known)
    raise NotFoundError(
        "There is no such adapter.",
        hint="GET /v1/list_loras lists them.",
        code="model_not_found",
        param="model",
    )


@router.delete("/v1/models/{model_id:path}")
async def delete_model(context: Context, model_id: str) -> None:
    context.check_model(model_id, context.card())
    raise RequestError("The served model cannot be deleted.", code="model_not_deletable")


def _adapters(context: ServerContext) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = context.client.loras.known().get("loaded_adapters", [])
    return found


def _adapter(context: ServerContext, known: dict[str, Any]) -> dict[str, Any]:
    """An adapter as OpenAI's clients see it: a model of its own, made from the served one."""
    model = _model(context, known["nickname"])
    name = f"{model['id']}:{known['nickname']}"
    return {**model, "id": name, "parent": model["id"]}


def _model(context: ServerContext, path: str) -> dict[str, Any]:
    card = context.card()
    return {
        "id": context.model_name(card),
        "object": "model",
        "created": context.started_at,
        "owned_by": "sgl_diffusion",
        "root": path,
        "parent": None,
        "max_model_len": None,
        "num_gpus": context.settings.num_gpus,
        "task_type": card.tasks[0],
        "supported_task_types": list(card.tasks),
        "edits": card.edits,
        "max_images": card.max_images,
        "dit_precision": card.dit_precision,
        "vae_precision": card.vae_precision,
        "pipeline_name": card.family,
        "pipeline_class": card.pipeline_class,
    }
