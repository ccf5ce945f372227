"""Video jobs in the background: rows of the job table, run in order, finished as files.

A row is the truth; this object only holds what is alive. A server that stops leaves its rows
queued or in progress, and the next one begins with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from sgl_diffusion.base.errors import BusyError, NotFoundError, SglError, UnavailableError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.client.types import partial_of
from sgl_diffusion.orchestrator.job import Asked
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore
from sgl_diffusion.server.accepted import accepts, following, settled
from sgl_diffusion.server.admission import Admission, Ticket
from sgl_diffusion.server.errors import not_found
from sgl_diffusion.server.files import Files
from sgl_diffusion.server.outcomes import Outcomes
from sgl_diffusion.server.previews import Preview, preview_of
from sgl_diffusion.server.repeats import Origin
from sgl_diffusion.server.sharing import AT_ONCE, stays_here
from sgl_diffusion.server.turn import Turn

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
    preview: Preview | None = None

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
        self.live: dict[str, _Live] = {}
        self._queue: asyncio.Queue[_Live | Turn] = asyncio.Queue()
        self._turns: set[Turn] = set()
        self._slots = asyncio.Semaphore(AT_ONCE if jobs.shared else IN_FLIGHT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self.stopping = False

    async def start(self) -> None:
        """Take up the rows that an earlier server left."""
        for row in await self.jobs.recover():
            self.enter(row)
        self._client.loras.order = self._in_turn
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
        if self._turns:
            row = following(row)
        if origin.repeatable:
            earlier = await self.jobs.earlier(row, retried=origin.retried)
            if earlier is not None:
                return earlier
        live = _Live(row, self._admission.enter(row.kind, row.owner))
        self.live[row.id] = live  # before the first await: concurrent calls see each other
        try:
            stored = await self.jobs.insert(row, retried=origin.retried, bound=stays_here(row))
        except BaseException:
            self._forget(live)
            raise
        if stored is row:
            if self._turns:  # one may have come meanwhile
                live.row = following(row)
            self._queue.put_nowait(live)
        else:
            self._forget(live)
        return stored

    def snapshot(self, job_id: str) -> Snapshot | None:
        """Where a job that the client knows stands; None for one that waits or has ended."""
        live = self.live.get(job_id)
        return live.handle.snapshot() if live and live.handle else None

    def preview(self, job_id: str) -> Preview | None:
        """The newest picture of a running job."""
        live = self.live.get(job_id)
        return live.preview if live else None

    def position(self, job_id: str) -> int | None:
        """How many videos wait ahead of a waiting one."""
        ahead = 0
        for live in self.live.values():
            if live.row.id == job_id:
                return ahead if live.ticket.waits else None
            ahead += live.ticket.waits
        return None

    async def delete(self, job_id: str) -> None:
        """End a job if it lives, and forget its row and file; NotFoundError for an unknown id."""
        if not await self.jobs.delete(job_id):
            raise not_found("video")
        await self.drop(job_id)

    async def drop(self, job_id: str) -> None:
        """End a job whose row is not ours any more, and remove its files."""
        live = self.live.get(job_id)
        if live is not None:
            live.dropped = True
            live.ticket.close("cancelled")
            if live.handle is not None:
                live.handle.cancel()
        await asyncio.to_thread(self._files.remove, job_id)

    def stop_taking(self) -> None:
        """Queued rows stay queued from now on, and jobs that are ended now keep their rows."""
        self.stopping = True
        for turn in self._turns:  # the client refuses what waits for it
            turn.reach()
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

    def enter(self, row: JobRow, asked: Asked | None = None) -> None:
        """Queue a row that is in the table."""
        live = _Live(row, self._admission.readmit(row.kind, row.owner, asked))
        self.live[row.id] = live
        self._queue.put_nowait(live)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """A change of the adapters: after the videos that were accepted before it, and before
        those that are accepted from now on."""
        turn = Turn()
        self._turns.add(turn)
        self._queue.put_nowait(turn)
        try:
            await turn.come()
            yield
        finally:
            self._turns.discard(turn)
            turn.end()

    async def _dispatch(self) -> None:
        while True:
            await self._take(await self._queue.get())

    async def _take(self, item: _Live | Turn) -> None:
        """Its own frame: nothing in `_dispatch` may hold the last job's frames."""
        if isinstance(item, Turn):
            item.reach()
            await item.ended()
        else:
            await self._hand_over(item)

    async def _hand_over(self, live: _Live) -> None:
        """Give a row to the client."""
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
                if accepts(self._client, row, params):
                    if changes := settled(self._client, row, params):
                        live.row = row = await self.jobs.update(row.id, **changes)
                    return await self._client.submit(
                        params,
                        job_id=row.id,
                        deadline=self._settings.jobs.video_timeout,
                        attempt=max(row.attempts, 1),
                        asked=live.ticket.asked,
                    )
            except (BusyError, UnavailableError):
                pass
            await asyncio.sleep(_RETRY_SECONDS)
        return None

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
            await asyncio.to_thread(self._files.remove, live.row.id)
            live.ticket.close("cancelled")
        elif self.stopping and isinstance(error, SglError):
            await self._outcomes.store(live.row, status="queued", why={"server": "stopped"})
        elif isinstance(error, UnavailableError) and error.code != "insufficient_storage":
            # No worker can be started now: that is not the fault of this job, so it waits.
            attempts = live.handle.snapshot().attempt if live.handle else live.row.attempts
            await self._outcomes.store(live.row, status="queued", why={"worker": "not ready"})
            live.ticket.drop()
            self.enter(replace(live.row, attempts=attempts), live.ticket.asked)
        else:
            await self._fail(live, error)

    async def _mark_progress(self, live: _Live, handle: GenerationHandle) -> None:
        """Keep in the row what a restart must know; single steps are only in the snapshot."""
        stored = (live.row.status, live.row.attempts)
        async for event in handle.events():
            now = (event.snapshot.state, event.snapshot.attempt)
            # In the queue with a further attempt: its worker died, and the next server must know.
            begun = now[0] == "in_progress"
            if now != stored and (begun or (now[0] == "queued" and now[1] > max(stored[1], 1))):
                await self.jobs.update(live.row.id, status=now[0], attempts=now[1])
                stored = now
            part = partial_of(event)
            if part is not None:
                live.preview = await asyncio.to_thread(preview_of, part)

    async def _fail(self, live: _Live, error: Exception) -> None:
        if live.handle is not None:
            live.handle.cancel()  # it may be the table that failed and not the job
        live.ticket.close(await self._outcomes.fail(live.row, error))

    def _leave(self, live: _Live) -> None:
        self._forget(live)
        self._slots.release()

    def _forget(self, live: _Live) -> None:
        live.ticket.drop()
        if self.live.get(live.row.id) is live:  # else it waits again, as another entry
            del self.live[live.row.id]
