"""Health, and what is served: /health /livez /readyz /models /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.errors import envelope

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The event loop answers; says nothing about the worker."""
    return {"status": "ok"}


@router.get("/health")
@router.get("/readyz")
async def readyz(context: Context) -> Response:
    """200 when a job would run now."""
    health = context.client.health()
    state = "draining" if context.draining else health.state
    if health.ready and not context.draining:
        return JSONResponse({"status": "ok", "running": True, "restarts": health.restarts})
    reason = health.reason or f"The server is {state}."
    body = envelope(503, reason, "draining" if context.draining else "not_ready")
    body |= {
        "status": state,
        "running": False,
        "reason": reason,
        "restarts": health.restarts,
    }
    return JSONResponse(body, status_code=503, headers={"retry-after": "1"})


@router.get("/models")
async def served(context: Context) -> dict[str, Any]:
    """SGLang's description of the one served model; OpenAI's list is /v1/models."""
    card = context.card()
    return {
        "model_path": card.path,
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


@router.get("/v1/models")
async def list_models(context: Context) -> dict[str, Any]:
    return {"object": "list", "data": [_model(context)]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(context: Context, model_id: str) -> dict[str, Any]:
    context.check_model(model_id, context.card())
    return _model(context)


def _model(context: ServerContext) -> dict[str, Any]:
    card = context.card()
    return {
        "id": context.model_name(card),
        "object": "model",
        "created": context.started_at,
        "owned_by": "sgl_diffusion",
        "root": card.path,
        "parent": None,
        "max_model_len": None,
        "num_gpus": context.settings.num_gpus,
        "task_type": card.tasks[0],
        "supported_task_types": list(card.tasks),
        "dit_precision": card.dit_precision,
        "vae_precision": card.vae_precision,
        "pipeline_name": card.family,
        "pipeline_class": card.pipeline_class,
    }
