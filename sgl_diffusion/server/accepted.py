"""What a video was accepted for: the model, and the adapters that all jobs have.

A video that is accepted while a change of the adapters waits comes after that change, and is for
whatever is set then. Its row says so until the change is over, also to the next server.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import ConflictError
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.orchestrator.jobstore import JobRow

if TYPE_CHECKING:
    from sgl_diffusion.client.client import Client

_FOLLOWS = "follows_change"


def following(row: JobRow) -> JobRow:
    """The row of a video that comes after a change that waits."""
    return replace(row, payload=row.payload | {_FOLLOWS: True})


def accepts(client: Client, row: JobRow, params: ResolvedParams) -> bool:
    """Whether the served model is known; ConflictError if the job was made for another, or for
    other adapters than those that every job gets now."""
    card = client.card()
    if card is None:
        return False
    if row.model and row.model != card.path:
        raise ConflictError(
            f"The job was accepted for the model {row.model}, which is not served any more.",
            hint="Send it again to run it on the present one.",
            code="model_changed",
        )
    follows = params.loras or _FOLLOWS in row.payload
    if not follows and row.adapters != client.loras.active():
        raise ConflictError(
            "The job was accepted with other adapters than those that are set now.",
            hint="Send it again to run it with the present ones.",
            code="adapters_changed",
        )
    return True


def settled(client: Client, row: JobRow, params: ResolvedParams) -> dict[str, Any] | None:
    """Columns that change when a row no longer waits for a change; None where it did not."""
    if _FOLLOWS not in row.payload:
        return None
    payload = {name: value for name, value in row.payload.items() if name != _FOLLOWS}
    return {
        "payload": payload,
        "adapters": row.adapters if params.loras else client.loras.active(),
    }
