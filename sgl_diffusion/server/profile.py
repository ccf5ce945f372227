"""POST /start_profile and POST /stop_profile: a record of what the workers and this process do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from sgl_diffusion.base.trace import joined
from sgl_diffusion.server.context import Context

router = APIRouter()


@router.post("/start_profile")
async def start(context: Context) -> dict[str, str]:
    """Begin a record; 409 while there is one."""
    context.check_open()
    await context.client.start_profile()
    context.record.start()
    return {"status": "ok", "message": "The server records what it does."}


@router.post("/stop_profile")
async def stop(context: Context) -> dict[str, Any]:
    """End the record. The answer is a trace file: keep it, and open it with ui.perfetto.dev."""
    context.check_open()
    workers = await context.client.stop_profile()
    own = {"server": context.record.stop()} if context.record.on else {}
    return joined({**own, **workers})
