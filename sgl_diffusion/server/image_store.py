"""Kept images: list, retrieve, delete, content."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.errors import not_found
from sgl_diffusion.server.image_job import KIND, image_url
from sgl_diffusion.server.media import IMAGE_TYPES
from sgl_diffusion.server.pages import Page, page_of
from sgl_diffusion.server.rows import find_row, visible_to
from sgl_diffusion.server.sendfile import file_response

router = APIRouter(prefix="/v1/images")


@router.get("")
async def list_images(
    request: Request,
    context: Context,
    after: str | None = None,
    limit: str = "20",
    order: str = "desc",
) -> dict[str, Any]:
    page, owner = Page.of(after, limit, order), visible_to(request)
    if after is not None:
        try:
            await find_row(context, KIND, after, owner)
        except NotFoundError:
            raise page.unknown() from None
    rows = await page.rows(context.jobs, KIND, owner)
    return page_of([_describe(context, row) for row in rows], page)


@router.get("/{image_id}")
async def retrieve(context: Context, image_id: str) -> dict[str, Any]:
    return _describe(context, await _find(context, image_id))


@router.delete("/{image_id}")
async def delete(context: Context, image_id: str) -> dict[str, Any]:
    await _find(context, image_id)
    if not await context.jobs.delete(image_id):
        raise not_found(KIND)
    await context.in_thread(partial(context.files.remove, image_id))
    return {"id": image_id, "object": "image.deleted", "deleted": True}


@router.api_route("/{image_id}/content", methods=["GET", "HEAD"])
async def content(
    request: Request, context: Context, image_id: str, variant: str = "0"
) -> Response:
    if not (variant.isascii() and variant.isdigit() and len(variant) <= 2):
        raise RequestError("variant is the number of an image.", param="variant")
    row = await _find(context, image_id)
    if int(variant) >= len(row.files):
        raise NotFoundError(
            "There are fewer images.", code="variant_not_available", param="variant"
        )
    kind = row.payload["output_format"]
    path = context.files.image(image_id, int(variant), kind)
    try:
        return await file_response(request, path, IMAGE_TYPES[kind])
    except FileNotFoundError:
        url = context.redirect_url(row.files[int(variant)])
        if url is not None:
            return RedirectResponse(url, status_code=302)
        await context.check_here(image_id)
        raise NotFoundError("The file of this image is gone.", code="image_expired") from None


async def _find(context: ServerContext, image_id: str) -> JobRow:
    if image_id in ("generations", "edits", "variations"):
        raise HTTPException(405)
    return await find_row(context, KIND, image_id)


def _describe(context: ServerContext, row: JobRow) -> dict[str, Any]:
    """An image as the POST routes answer it, without the pictures themselves."""
    params = row.payload["params"]
    count = len(row.files)
    return {
        "id": row.id,
        "object": "image",
        "status": row.status,
        "model": row.payload["model"],
        "created_at": int(row.created_at),
        "expires_at": None if row.expires_at is None else int(row.expires_at),
        "prompt": params["prompt"],
        "size": f"{params['width']}x{params['height']}",
        "output_format": row.payload["output_format"],
        "seeds": row.seeds,
        "data": [
            {
                "b64_json": None,
                "url": image_url(context, row, index),
                "revised_prompt": None,
            }
            for index in range(count)
        ],
    }
