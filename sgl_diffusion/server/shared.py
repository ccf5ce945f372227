"""What the routes of every app share, whatever it serves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from sgl_diffusion.base.errors import UnavailableError
from sgl_diffusion.base.trace import Record
from sgl_diffusion.orchestrator.messages import Metric

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.limits import Health
    from sgl_diffusion.server.context import Settings
    from sgl_diffusion.server.gauges import Gauges
    from sgl_diffusion.server.inputs import Inputs


class _Card(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=_Card)
C_co = TypeVar("C_co", bound=_Card, covariant=True)
T = TypeVar("T")


class _Client(Protocol[C_co]):
    def card(self) -> C_co | None: ...

    def health(self) -> Health: ...

    def metrics(self) -> list[Metric]: ...


@dataclass(kw_only=True)
class AppContext(Generic[C]):
    """`C` is the kind of card that tells what the model of the app can do."""

    client: _Client[C]
    inputs: Inputs
    settings: Settings
    threads: ThreadPoolExecutor
    gauges: Gauges
    record: Record = field(default_factory=Record)  # of files that are encoded, for a profile
    started_at: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    rejected: Counter[str] = field(default_factory=Counter)

    def samples(self) -> list[Metric]:
        rejected = [
            Metric("rejected_total", count, {"code": code})
            for code, count in sorted(self.rejected.items())
        ]
        return [*self.client.metrics(), *self.gauges.metrics(), *rejected]

    def card(self) -> C:
        """The served model; UnavailableError until a worker has told it."""
        card = self.client.card()
        if card is None:
            health = self.client.health()
            reason = f": {health.reason}" if health.reason else "."
            raise UnavailableError(f"The model is not ready{reason}", hint="GET /readyz says when.")
        return card

    def model_name(self, card: C) -> str:
        return self.settings.served_model_name or card.name

    def check_open(self) -> None:
        if self.draining:
            raise UnavailableError("The server is shutting down.", code="draining")

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)
