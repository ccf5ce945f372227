"""Rows of images: of those that have a URL, and of those that may be asked for again."""

from __future__ import annotations

import base64
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.context import ServerContext
from sgl_diffusion.server.repeats import Origin

KIND = "image"


async def keep_image(
    context: ServerContext,
    origin: Origin,
    params: ResolvedParams,
    answer: dict[str, Any],
    files: list[dict[str, Any]],
) -> None:
    """Store the row of images whose files are in place. The answer is kept without its pixels."""
    lean = [{**entry, "b64_json": entry["b64_json"] is not None} for entry in answer["data"]]
    now = time.time()
    row = _row(
        origin,
        id=answer["id"],
        payload={"params": asdict(params), "answer": {**answer, "data": lean}},
        status="completed",
        progress=100,
        attempts=1,
        completed_at=now,
        expires_at=context.keeper.expires_at(),
        files=files,
        model=context.card().path,
        seeds=list(params.seeds),
    )
    await context.jobs.insert(row)


async def earlier_answer(context: ServerContext, origin: Origin) -> dict[str, Any] | None:
    """The answer that the same request got before, with its pixels; None if it is a new one."""
    if not origin.repeatable:
        return None
    row = await context.jobs.earlier(_row(origin, id="", payload={}), retried=origin.retried)
    if row is None or not context.files.has(row.files):
        return None
    answer: dict[str, Any] = row.payload["answer"]
    return await context.in_thread(partial(_with_pixels, context, row, answer))


def _with_pixels(context: ServerContext, row: JobRow, answer: dict[str, Any]) -> dict[str, Any]:
    data = []
    for entry, file in zip(answer["data"], row.files, strict=True):
        encoded = (context.files.images / file["name"]).read_bytes() if entry["b64_json"] else None
        text = None if encoded is None else base64.b64encode(encoded).decode()
        data.append({**entry, "b64_json": text})
    return {**answer, "data": data}


def _row(origin: Origin, **fields: Any) -> JobRow:
    return JobRow(
        kind=KIND,
        owner=origin.owner,
        idempotency_key=origin.key,
        body_hash=origin.body_hash,
        **fields,
    )
