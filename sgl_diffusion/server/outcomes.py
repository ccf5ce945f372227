"""How a video job ends: frames become files, the row says completed, or failed and why."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import NotFoundError, SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.trace import Record
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore
from sgl_diffusion.server.files import Files
from sgl_diffusion.server.keeper import Keeper
from sgl_diffusion.server.outputs import write_video_files

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Generation

log = get_logger(__name__)

_INTERNAL = "The server met an internal error. Its log holds the details under this video's id."


class Outcomes:
    def __init__(
        self,
        jobs: JobStore,
        files: Files,
        keeper: Keeper,
        threads: ThreadPoolExecutor,
        record: Record,
        *,
        metadata: bool,
    ) -> None:
        self._jobs = jobs
        self._files = files
        self._keeper = keeper
        self._threads = threads
        self._record = record
        self._metadata = metadata

    async def finish(self, row: JobRow, generation: Generation) -> None:
        """Write the files, then the row: it points to whole files only."""
        write = partial(self._write, row, generation)
        written = await asyncio.get_running_loop().run_in_executor(self._threads, write)
        await self._jobs.update(
            row.id,
            status="completed",
            progress=100,
            attempts=generation.attempt,
            completed_at=time.time(),
            expires_at=self._keeper.expires_at(),
            files=written,
        )

    def _write(self, row: JobRow, generation: Generation) -> list[dict[str, Any]]:
        with self._record.span("file", job=row.id):
            return write_video_files(self._files, generation, row.payload, metadata=self._metadata)

    async def fail(self, row: JobRow, error: Exception) -> str:
        """Returns the code that the row gets."""
        ours = isinstance(error, SglError)
        if not ours:
            log.error("video %s failed", row.id, exc_info=error)
        code = error.code if isinstance(error, SglError) else "internal_error"
        message = str(error) if ours else _INTERNAL
        await self.store(
            row,
            status="failed",
            error={"code": code, "message": message},
            completed_at=time.time(),
            expires_at=self._keeper.expires_at(),
        )
        return code

    async def store(self, row: JobRow, **changes: Any) -> None:
        """Change the row of a job that is over: nobody is left to hear of an error."""
        try:
            await self._jobs.update(row.id, **changes)
        except NotFoundError:
            pass  # deleted meanwhile
        except SglError as problem:
            log.error("the state of video %s cannot be stored: %s", row.id, problem)
