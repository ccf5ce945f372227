"""Work of several servers on one job table: rows come from others, and go to them.

A server asks twice a second which of its jobs it still holds, and takes over some that wait while
it has little to do itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore

if TYPE_CHECKING:
    from sgl_diffusion.client.client import Client
    from sgl_diffusion.server.background import VideoRunner

log = get_logger(__name__)

_EVERY = 0.5
AT_ONCE = 4  # jobs that a server works on: what waits behind them others may take


def stays_here(row: JobRow) -> bool:
    """Whether a job needs what only this server has: its pictures, or adapters of this machine."""
    params = row.payload["params"]
    return bool(params["images"]) or any(use.get("local") for use in params["loras"])


class Sharing:
    def __init__(self, runner: VideoRunner, client: Client) -> None:
        self._runner = runner
        self._client = client
        self._jobs: JobStore = runner.jobs
        self._told: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._jobs.shared:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Once: drop what is not ours any more, tell how far the rest is, take what waits."""
        here = list(self._runner.live)
        for job_id in await self._jobs.lost(here):
            log.info("video %s is gone, or another server has it", job_id)
            await self._runner.drop(job_id)
        await self._tell(here)
        card = self._client.card()
        if card is None or self._runner.stopping or not self._client.health().ready:
            return
        like = JobRow(
            id="", kind="video", payload={}, model=card.path, adapters=self._client.loras.active()
        )
        here = list(self._runner.live)
        for row in await self._jobs.claim(like, max(AT_ONCE - len(here), 0), here):
            log.info("video %s is taken over", row.id)
            self._runner.enter(row)

    async def _tell(self, here: list[str]) -> None:
        """Put the progress of running jobs into their rows, for clients of other servers."""
        told, self._told = self._told, {}
        for job_id in here:
            snapshot = self._runner.snapshot(job_id)
            if snapshot is None or snapshot.state != "in_progress":
                continue
            progress = self._told[job_id] = min(snapshot.progress, 99)
            if progress != told.get(job_id):
                await self._jobs.tell(job_id, progress)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            try:
                await self.look()
            except SglError as error:
                log.error("the shared job table: %s", error)
