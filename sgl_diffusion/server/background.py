"""Video jobs in the background: rows of the job table, run in order, finished as files.

A row is the truth; this object only holds what is alive. A server that stops leaves its rows
queued or in progress, and the next one begins with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from sgl_diffusion.base.errors import (
    BusyError,
    ConflictError,
    NotFoundError,
    SglError,
    UnavailableError,
)
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore
from sgl_diffusion.server.admission import Admission, Ticket
from sgl_diffusion.server.files import Files
from sgl_diffusion.server.outcomes import Outcomes
from sgl_diffusion.server.repeats import Origin
from sgl_diffusion.server.rows import not_found

if TYPE_CHECKING:
    from sgl_diffusion.client.client import Client
    from sgl_diffusion.client.types import GenerationHandle, Snapshot
    from sgl_diffusion.server.context import Settings

log = get_logger(__name__)

IN_FLIGHT = 32  # rows given to the client at once: enough to batch, and images still get in
_RETRY_SECONDS = 0.5


@dataclass(eq=False)
class _Live:
    row: JobRow
    ticket: Ticket
    dropped: bool = False

    @property
    def handle(self) -> GenerationHandle | None:
        return self.ticket.handle


class VideoRunner:
    def __init__(
        self,
        client: Client,
        jobs: JobStore,
        files: Files,
        settings: Settings,
        admission: Admission,
        outcomes: Outcomes,
    ) -> None:
        self.jobs = jobs
        self._client = client
        self._files = files
        self._settings = settings
        self._admission = admission
        self._outcomes = outcomes
        self._live: dict[str, _Live] = {}
        self._queue: asyncio.Queue[_Live] = asyncio.Queue()
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Take up the rows that an earlier server left."""
        for row in await self.jobs.recover():
            self._enter(row)
        self._dispatcher = asyncio.create_task(self._dispatch())

    async def add(self, row: JobRow, origin: Origin) -> JobRow:
        """Commit a new row and queue it, or return the row that the same request made before.
        BusyError when enough are waiting, UnavailableError when there is no room for the result."""
        card = self._client.card()
        assert card is not None, "its parameters were resolved"
        row = replace(
            row,
            model=card.path,
            owner=origin.owner,
            idempotency_key=origin.key,
            body_hash=origin.body_hash,
        )
        if origin.repeatable:
            earlier = await self.jobs.earlier(row, retried=origin.retried)
            if earlier is not None:
                return earlier
        live = _Live(row, self._admission.enter(row.kind, row.owner))
        self._live[row.id] = live  # before the first await: concurrent calls see each other
        try:
            stored = await self.jobs.insert(row, retried=origin.retried)
        except BaseException:
            self._forget(live)
            raise
        if stored is row:
            self._queue.put_nowait(live)
        else:
            self._forget(live)
        return stored

    def snapshot(self, job_id: str) -> Snapshot | None:
        """Where a job that the client knows stands; None for one that waits or has ended."""
        live = self._live.get(job_id)
        return live.handle.snapshot() if live and live.handle else None

    def position(self, job_id: str) -> int | None:
        """How many videos wait ahead of a waiting one."""
        ahead = 0
        for live in self._live.values():
            if live.row.id == job_id:
                return ahead if live.ticket.waits else None
            ahead += live.ticket.waits
        return None

    async def delete(self, job_id: str) -> None:
        """End a job if it lives, and forget its row and file; NotFoundError for an unknown id."""
        if not await self.jobs.delete(job_id):
            raise not_found("video")
        live = self._live.get(job_id)
        if live is not None:
            live.dropped = True
            if live.handle is not None:
                live.handle.cancel()
        self._files.remove(job_id)

    def stop_taking(self) -> None:
        """Queued rows stay queued from now on, and jobs that are ended now keep their rows."""
        self._stopping = True
        if self._dispatcher is not None:
            self._dispatcher.cancel()

    async def stop(self) -> None:
        """Drop everything that is alive; the rows stay."""
        self.stop_taking()
        tasks = [*self._tasks, *([self._dispatcher] if self._dispatcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self, seconds: float) -> None:
        """Wait until the results that are there have become files."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def _enter(self, row: JobRow) -> None:
        live = _Live(row, self._admission.readmit(row.kind, row.owner))
        self._live[row.id] = live
        self._queue.put_nowait(live)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dispatch(self) -> None:
        while True:
            await self._hand_over(await self._queue.get())

    async def _hand_over(self, live: _Live) -> None:
        """Give a row to the client. Its own frame: nothing here may hold the last job's frames."""
        await self._slots.acquire()
        try:
            live.ticket.handle = await self._submit(live)
        except Exception as error:
            await self._fail(live, error)
        if live.handle is None:
            self._leave(live)
        else:
            self._spawn(self._follow(live, live.handle))

    async def _submit(self, live: _Live) -> GenerationHandle | None:
        row = live.row
        params = msgspec.convert(row.payload["params"], ResolvedParams)
        while not live.dropped:
            try:
                if self._accepts(row, params):
                    return await self._client.submit(
                        params,
                        job_id=row.id,
                        deadline=self._settings.jobs.video_timeout,
                        attempt=max(row.attempts, 1),
                    )
            except (BusyError, UnavailableError):
                pass
            await asyncio.sleep(_RETRY_SECONDS)
        return None

    def _accepts(self, row: JobRow, params: ResolvedParams) -> bool:
        """Whether the served model is known; ConflictError if the job was made for another, or for
        other adapters than those that every job gets now."""
        card = self._client.card()
        if card is None:
            return False
        if row.model and row.model != card.path:
            raise ConflictError(
                f"The job was accepted for the model {row.model}, which is not served any more.",
                hint="Send it again to run it on the present one.",
                code="model_changed",
            )
        if not params.loras and row.adapters != self._client.loras.active():
            raise ConflictError(
                "The job was accepted with other adapters than those that are set now.",
                hint="Send it again to run it with the present ones.",
                code="adapters_changed",
            )
        return True

    async def _follow(self, live: _Live, handle: GenerationHandle) -> None:
        if live.dropped:
            handle.cancel()
        try:
            await self._mark_progress(live, handle)
            await self._outcomes.finish(live.row, await handle.result())
            live.ticket.close()
        except Exception as error:
            await self._ended_badly(live, error)
        finally:
            self._leave(live)

    async def _ended_badly(self, live: _Live, error: Exception) -> None:
        if isinstance(error, NotFoundError):  # the row was deleted under the job
            if live.handle is not None:
                live.handle.cancel()
            self._files.remove(live.row.id)
            live.ticket.close("cancelled")
        elif self._stopping and isinstance(error, SglError):
            await self._outcomes.store(live.row, status="queued", why={"server": "stopped"})
        elif isinstance(error, UnavailableError) and error.code != "insufficient_storage":
            # No worker can be started now: that is not the fault of this job, so it waits.
            attempts = live.handle.snapshot().attempt if live.handle else live.row.attempts
            await self._outcomes.store(live.row, status="queued", why={"worker": "not ready"})
            live.ticket.drop()
            self._enter(replace(live.row, attempts=attempts))
        else:
            await self._fail(live, error)

    async def _mark_progress(self, live: _Live, handle: GenerationHandle) -> None:
        """Keep in the row what a restart must know; single steps are only in the snapshot."""
        stored = (live.row.status, live.row.attempts)
        async for event in handle.events():
            now = (event.snapshot.state, event.snapshot.attempt)
            if event.snapshot.state == "in_progress" and now != stored:
                await self.jobs.update(live.row.id, status="in_progress", attempts=now[1])
                stored = now

    async def _fail(self, live: _Live, error: Exception) -> None:
        if live.handle is not None:
            live.handle.cancel()  # it may be the table that failed and not the job
        live.ticket.close(await self._outcomes.fail(live.row, error))

    def _leave(self, live: _Live) -> None:
        self._forget(live)
        self._slots.release()

    def _forget(self, live: _Live) -> None:
        live.ticket.drop()
        if self._live.get(live.row.id) is live:  # else it waits again, as another entry
            del self._live[live.row.id]
