"""The one Python door to the engine: submit, follow, cancel, control.

A client lives in one asyncio event loop. It starts the app's stages, keeps them alive, and turns
parameters into jobs and answers into frames; it never imports torch.
"""

from __future__ import annotations

import msgspec

from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingParams
from sgl_diffusion.client.loras import LoraCalls
from sgl_diffusion.client.types import GenerationHandle, Health, Limits
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.topology import App
from sgl_diffusion.orchestrator.transport import ProcessTransport, ThreadTransport


class Client:
    """`in_process` runs the stage in a thread of this process: for `generate` and for tests."""

    def __init__(
        self,
        app: App,
        *,
        in_process: bool = False,
        max_queue: int = 128,
        log_level: str = "info",
        limits: Limits | None = None,
        lora_timeout: float = 600.0,
    ) -> None:
        self._coordinator = Coordinator(
            app,
            transport=ThreadTransport() if in_process else ProcessTransport(),
            max_jobs=max_queue,
            log_level=log_level,
            limits=limits or Limits(),
        )
        self.loras = LoraCalls(self._coordinator, lora_timeout)
        self._card: ModelCard | None = None
        self._card_of: Payload | None = None

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

    def card(self) -> ModelCard | None:
        """The served model; None until a worker was ready once."""
        fields = self._coordinator.card()
        if fields is not self._card_of:
            self._card = msgspec.convert(fields, ModelCard)
            self._card_of = fields
        return self._card

    def health(self) -> Health:
        return self._coordinator.health()

    def metrics(self) -> list[Metric]:
        """Samples of the stages and of the coordinator, as they stand now."""
        return self._coordinator.metrics()

    def resolve(self, wish: SamplingParams, *, video: bool) -> ResolvedParams:
        """Fill in and check what was asked; raises RequestError, or UnavailableError while no
        worker has said yet what the model can do."""
        card = self.card()
        if card is None:
            raise self._coordinator.unavailable()
        return card.resolve(wish, video=video)

    async def submit(
        self,
        params: ResolvedParams,
        *,
        job_id: str | None = None,
        deadline: float | None = None,
        attempt: int = 1,
    ) -> GenerationHandle:
        """Queue a generation. `deadline` is in seconds from now; after it the job fails with the
        code `deadline_exceeded`. `attempt` counts on where an earlier server's worker died under
        the job. Raises BusyError (with `retry_after`) and UnavailableError."""
        await self.loras.prepare(params.loras)
        payload = {"params": msgspec.to_builtins(params)}
        job = await self._coordinator.submit(
            payload, job_id=job_id, deadline=deadline, attempt=attempt
        )
        return GenerationHandle(job, params)

    def cancel(self, job_id: str) -> bool:
        """End a job now with CancelledError; False if there is no such unfinished job."""
        return self._coordinator.cancel(job_id)

    async def control(self, action: str, payload: Payload | None = None) -> Payload:
        """Run a control action between steps. Not retried: UnavailableError if the worker dies."""
        return await self._coordinator.control(action, payload or {})
