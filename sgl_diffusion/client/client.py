"""The one Python door to the engine: submit, follow, cancel, control.

A client lives in one asyncio event loop. It starts the app's stages, keeps them alive, and turns
parameters into jobs and answers into frames; it never imports torch.
"""

from __future__ import annotations

import dataclasses

import msgspec

from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingParams
from sgl_diffusion.client.door import Door
from sgl_diffusion.client.loras import LoraCalls
from sgl_diffusion.client.types import GenerationHandle, Limits
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.job import Asked
from sgl_diffusion.orchestrator.messages import Payload
from sgl_diffusion.orchestrator.topology import App


class Client(Door[Coordinator]):
    """The door to an app that makes pictures and videos."""

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
        super().__init__(
            Coordinator,
            app,
            in_process=in_process,
            max_queue=max_queue,
            log_level=log_level,
            limits=limits,
        )
        self.loras = LoraCalls(self._coordinator, lora_timeout)
        self._card: ModelCard | None = None
        self._card_of: Payload | None = None

    def card(self) -> ModelCard | None:
        """The served model; None until a worker was ready once."""
        fields = self._coordinator.card()
        if fields is not self._card_of:
            self._card = msgspec.convert(fields, ModelCard)
            self._card_of = fields
        return self._card

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
        asked: Asked | None = None,
    ) -> GenerationHandle:
        """Queue a generation. `deadline` is in seconds from now; after it the job fails with the
        code `deadline_exceeded`. `attempt` counts on where an earlier server's worker died under
        the job; `asked` is for the metrics. Raises BusyError (with `retry_after`) and
        UnavailableError."""
        params = dataclasses.replace(params, loras=await self.loras.prepare(params.loras))
        payload = {"params": msgspec.to_builtins(params)}
        job = await self._coordinator.submit(
            payload,
            job_id=job_id,
            deadline=deadline,
            attempt=attempt,
            weight=_work(params),
            asked=asked,
        )
        return GenerationHandle(job, params)

    async def control(self, action: str, payload: Payload | None = None) -> Payload:
        """Run a control action between steps. Not retried: UnavailableError if the worker dies."""
        return await self._coordinator.control(action, payload or {})

    async def start_profile(self) -> None:
        """Record what every worker does from now on; ConflictError if all do so already."""
        await self._coordinator.control_any("profile_start", {})

    async def stop_profile(self) -> dict[str, Payload]:
        """The record of each worker by its name, for `base.trace.joined`; ConflictError if there is
        none. A worker that was started meanwhile has none."""
        return await self._coordinator.control_any("profile_stop", {})


def _work(params: ResolvedParams) -> float:
    """How much a job has to do, compared with others of the same model."""
    pixels = params.width * params.height * params.num_frames
    return float(pixels * len(params.seeds) * params.num_inference_steps)
