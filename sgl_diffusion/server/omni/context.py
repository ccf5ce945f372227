"""What the routes of an omni server share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from sgl_diffusion.base.chat import ChatCard, ChatParams
from sgl_diffusion.base.errors import BusyError, NotFoundError, UnavailableError
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.client.chat import ChatClient, ChatHandle
from sgl_diffusion.orchestrator.job import Asked
from sgl_diffusion.server.shared import AppContext


class FullError(UnavailableError):
    """As many requests are unfinished as the server takes."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 5, **details: Any) -> None:
        super().__init__(message, **details)
        self.retry_after = retry_after


@dataclass(kw_only=True)
class OmniContext(AppContext[ChatCard]):
    client: ChatClient
    options: OmniServeOptions
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def check_model(self, name: str | None, card: ChatCard) -> None:
        """A request may name the served model or its path, or leave the name out."""
        known = {None, self.model_name(card), card.name, self.settings.model_path}
        if name not in known:
            raise NotFoundError(
                "This server does not serve that model.",
                hint=f"It serves {self.model_name(card)!r}.",
                code="model_not_found",
                param="model",
            )

    async def submit(self, params: ChatParams, job_id: str, kind: str) -> ChatHandle:
        """`kind` is what the metrics call the request."""
        self.check_open()
        deadline = self.options.request_timeout
        try:
            asked = Asked(kind)
            return await self.client.submit(params, job_id=job_id, deadline=deadline, asked=asked)
        except BusyError as busy:
            full = FullError(busy.message, hint=busy.hint, retry_after=busy.retry_after)
            raise full from None


def _of_request(request: Request) -> OmniContext:
    context = request.app.state.context
    assert isinstance(context, OmniContext)
    return context


Context = Annotated[OmniContext, Depends(_of_request)]
