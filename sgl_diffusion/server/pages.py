"""Pages of a list, as OpenAI's clients turn them: `after`, `limit`, `order`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore

_MAX_PAGE = 100


@dataclass(frozen=True)
class Page:
    after: str | None
    limit: int
    order: Literal["asc", "desc"]

    @classmethod
    def of(cls, after: str | None, limit: str, order: str) -> Page:
        """From the texts of a query."""
        count = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 9 else 0
        if not 1 <= count <= _MAX_PAGE:
            raise RequestError(
                f"limit must be a number from 1 to {_MAX_PAGE}.",
                code="out_of_range",
                param="limit",
            )
        if order == "asc":
            return cls(after, count, "asc")
        if order == "desc":
            return cls(after, count, "desc")
        raise RequestError("order must be asc or desc.", param="order")

    async def rows(self, jobs: JobStore, kind: str, owner: str | None = None) -> list[JobRow]:
        """The rows of the page, and one more where there is one."""
        try:
            return await jobs.list(
                kind, after=self.after, limit=self.limit + 1, order=self.order, owner=owner
            )
        except NotFoundError:
            raise self.unknown() from None

    def unknown(self) -> RequestError:
        return RequestError(
            "after is not the id of anything in this list.", code="invalid_cursor", param="after"
        )


def page_of(described: list[dict[str, Any]], page: Page) -> dict[str, Any]:
    """The answer, from as many descriptions as `Page.rows` gave rows."""
    data = described[: page.limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(described) > page.limit,
    }
