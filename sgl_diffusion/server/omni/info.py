"""GET /health /livez /readyz /metrics /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from sgl_diffusion.server.errors import envelope
from sgl_diffusion.server.metrics import render
from sgl_diffusion.server.omni.context import Context, OmniContext

router = APIRouter()

_GET = ["GET", "HEAD"]


@router.api_route("/livez", methods=_GET)
@router.api_route("/liveness", methods=_GET)
async def livez() -> dict[str, str]:
    """The event loop answers; says nothing about the worker."""
    return {"status": "ok"}


@router.api_route("/health", methods=_GET)
@router.api_route("/readyz", methods=_GET)
async def health(context: Context) -> Response:
    """200 when a request would be answered now."""
    state = context.client.health()
    if context.draining:
        return _unhealthy(context, "draining", "The server is draining.")
    if not state.ready:
        reason = state.reason or f"The server is {state.state}."
        return _unhealthy(context, "not_ready", reason)
    return JSONResponse({"status": "healthy", "running": True, "restarts": state.restarts})


def _unhealthy(context: OmniContext, code: str, reason: str) -> Response:
    state = context.client.health()
    body = envelope(503, reason, code)
    body |= {"status": "unhealthy", "running": False, "state": state.state, "reason": reason}
    body |= {"restarts": state.restarts}
    return JSONResponse(body, status_code=503, headers={"retry-after": "1"})


@router.get("/metrics")
async def metrics(context: Context) -> Response:
    return Response(render(context.samples()), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def list_models(context: Context) -> dict[str, Any]:
    return {"object": "list", "data": [_model(context)]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(context: Context, model_id: str) -> dict[str, Any]:
    context.check_model(model_id, context.card())
    return _model(context)


def _model(context: OmniContext) -> dict[str, Any]:
    card = context.card()
    return {
        "id": context.model_name(card),
        "object": "model",
        "created": context.started_at,
        "owned_by": "sgl_diffusion",
        "root": card.name,
        "parent": None,
        "max_model_len": card.context_length,
        "input_modalities": list(card.inputs),
        "output_modalities": ["text", "audio"] if card.voices else ["text"],
        "voices": list(card.voices),
    }
