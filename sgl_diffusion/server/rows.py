"""Finding the row of a video or an image, for those who made it."""

from __future__ import annotations

from fastapi import Request

from sgl_diffusion.base.errors import NotFoundError
from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.admission import ANYBODY
from sgl_diffusion.server.context import Context, ServerContext
from sgl_diffusion.server.errors import not_found
from sgl_diffusion.server.ids import is_id
from sgl_diffusion.server.repeats import owner_of


async def find_row(
    context: ServerContext, kind: str, job_id: str, owner: str | None = None
) -> JobRow:
    """The row, if it is of `kind` and belongs to `owner`; NotFoundError says "expired" for a day
    where the server itself removed it."""
    if not is_id(job_id, kind):
        raise not_found(kind)
    row = await context.jobs.get(job_id)
    if row is not None and row.kind == kind and owner in (None, row.owner):
        return row
    if row is None and await context.jobs.expired(job_id, owner):
        raise NotFoundError(
            f"This {kind} is no longer kept.",
            hint="The server removes old ones.",
            code=f"{kind}_expired",
            param=f"{kind}_id",
        )
    raise not_found(kind)


async def own_rows(request: Request, context: Context) -> None:
    """For every route with a job in its path: the jobs of other keys do not exist."""
    owner = visible_to(request)
    for kind in ("video", "image"):
        job_id = request.path_params.get(f"{kind}_id")
        if owner is not None and job_id is not None and is_id(job_id, kind):
            await find_row(context, kind, job_id, owner)


def visible_to(request: Request) -> str | None:
    """Whose rows the caller sees; None for all of them: without keys, and with an admin key."""
    owner = owner_of(request)
    caller = getattr(request.state, "caller", None)
    return None if owner == ANYBODY or getattr(caller, "admin", False) else owner
