"""What every client has: the stages of one app behind a desk that takes jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from sgl_diffusion.orchestrator.desk import Desk
from sgl_diffusion.orchestrator.limits import Health, Limits
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.orchestrator.topology import App
from sgl_diffusion.orchestrator.transport import ProcessTransport, ThreadTransport

D = TypeVar("D", bound=Desk)


class Door(Generic[D]):
    """`kind` makes the desk. `in_process` runs the stages in threads of this process: for
    `generate` and for tests."""

    def __init__(
        self,
        kind: Callable[..., D],
        app: App,
        *,
        in_process: bool = False,
        max_queue: int = 128,
        log_level: str = "info",
        limits: Limits | None = None,
    ) -> None:
        self._coordinator = kind(
            app,
            transport=ThreadTransport() if in_process else ProcessTransport(),
            max_jobs=max_queue,
            log_level=log_level,
            limits=limits or Limits(),
        )

    async def start(self) -> None:
        """Start the stages; returns at once, they load in the background."""
        await self._coordinator.start()

    async def ready(self) -> None:
        """Wait until jobs can run; raises the stage's error if it cannot start."""
        await self._coordinator.ready()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new jobs, give running ones time, then end the stages. A second call may only
        shorten the time."""
        await self._coordinator.stop(drain_seconds)

    def health(self) -> Health:
        return self._coordinator.health()

    def metrics(self) -> list[Metric]:
        """Samples of the stages and of the coordinator, as they stand now."""
        return self._coordinator.metrics()

    def cancel(self, job_id: str) -> bool:
        """End a job now with CancelledError; False if there is no such unfinished job."""
        return self._coordinator.cancel(job_id)
