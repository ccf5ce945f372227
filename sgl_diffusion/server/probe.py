"""The probe behind /health_generate: one real picture, the smallest that the model makes.

Whoever asks while one is made shares it, and for some seconds after it; so a probe that comes often
costs the worker a picture now and then, never a queue.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sgl_diffusion.base.blank import blank_pictures
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.server.ids import new_id

if TYPE_CHECKING:
    from sgl_diffusion.client.client import Client

KEEP_SECONDS = 5.0
_DEADLINE = 30.0


@dataclass(frozen=True)
class Finding:
    """`seconds` is what the picture took, from the queue to its pixels."""

    error: SglError | None
    seconds: float
    at: float

    @property
    def fresh(self) -> bool:
        return time.monotonic() - self.at < KEEP_SECONDS


class Probe:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._last: Finding | None = None
        self._running: asyncio.Task[Finding] | None = None

    async def ask(self) -> Finding:
        """The latest finding, or a new one if that is too old."""
        if self._last is not None and self._last.fresh:
            return self._last
        if self._running is None:
            self._running = asyncio.create_task(self._generate())
        # One caller that leaves takes nothing from the others.
        return await asyncio.shield(self._running)

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _generate(self) -> Finding:
        started = time.monotonic()
        error: SglError | None = None
        try:
            await self._picture()
        except SglError as problem:
            error = problem
        finally:
            self._running = None
        now = time.monotonic()
        self._last = Finding(error, now - started, now)
        return self._last

    async def _picture(self) -> None:
        # `resolve` refuses while no worker has told its card.
        wish = SamplingParams(prompt="health", num_inference_steps=1)
        card = self._client.card()
        if card is not None:
            wish = replace(wish, width=card.size_multiple, height=card.size_multiple)
        with blank_pictures(card.min_images if card is not None else 0) as images:
            params = self._client.resolve(replace(wish, images=images), video=False)
            handle = await self._client.submit(params, job_id=new_id("probe"), deadline=_DEADLINE)
            try:
                await handle.result()
            finally:
                handle.cancel()  # does nothing to a job that has ended
