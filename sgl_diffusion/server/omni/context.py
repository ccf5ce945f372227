"""What the routes of an omni server share."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import Depends, Request

from sgl_diffusion.base.chat import ChatCard, ChatParams
from sgl_diffusion.base.errors import BusyError, NotFoundError, UnavailableError
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.client.chat import ChatClient, ChatHandle
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server.context import Settings

if TYPE_CHECKING:
    from sgl_diffusion.server.gauges import Gauges
    from sgl_diffusion.server.inputs import Inputs

T = TypeVar("T")


class FullError(UnavailableError):
    """As many requests are unfinished as the server takes."""

    code = "queue_full"

    def __init__(self, busy: BusyError) -> None:
        super().__init__(busy.message, hint=busy.hint)
        self.retry_after = busy.retry_after


@dataclass
class OmniContext:
    client: ChatClient
    inputs: Inputs
    settings: Settings
    options: OmniServeOptions
    threads: ThreadPoolExecutor
    gauges: Gauges
    started_at: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    rejected: Counter[str] = field(default_factory=Counter)
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def samples(self) -> list[Metric]:
        rejected = [
            Metric("rejected_total", count, {"code": code})
            for code, count in sorted(self.rejected.items())
        ]
        return [*self.client.metrics(), *self.gauges.metrics(), *rejected]

    def card(self) -> ChatCard:
        """The served model; UnavailableError until a worker has told it."""
        card = self.client.card()
        if card is None:
            health = self.client.health()
            reason = f": {health.reason}" if health.reason else "."
            raise UnavailableError(f"The model is not ready{reason}", hint="GET /health says when.")
        return card

    def model_name(self, card: ChatCard) -> str:
        return self.settings.served_model_name or card.name

    def check_open(self) -> None:
        if self.draining:
            raise UnavailableError("The server is shutting down.", code="draining")

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

    async def submit(self, params: ChatParams, job_id: str) -> ChatHandle:
        self.check_open()
        deadline = self.options.request_timeout
        try:
            return await self.client.submit(params, job_id=job_id, deadline=deadline)
        except BusyError as busy:
            raise FullError(busy) from None

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


def _of_request(request: Request) -> OmniContext:
    context = request.app.state.context
    assert isinstance(context, OmniContext)
    return context


Context = Annotated[OmniContext, Depends(_of_request)]
