"""Video jobs in the background: rows of the job table, run in order, finished as files.

A row is the truth; this object only holds what is alive. A server that stops leaves its rows
queued or in progress, and the next one begins with them.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from sgl_diffusion.base.errors import (
    BusyError,
    NotFoundError,
    SglError,
    UnavailableError,
)
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server.files import Files
from sgl_diffusion.server.outputs import remove_video_files, write_video_files

if TYPE_CHECKING:
    from sgl_diffusion.client.client import Client
    from sgl_diffusion.client.types import Generation, GenerationHandle, Snapshot
    from sgl_diffusion.server.context import Settings

log = get_logger(__name__)

_IN_FLIGHT = 32  # rows given to the client at once: enough to batch, and images still get in
_RETRY_SECONDS = 0.5
_INTERNAL = "The server met an internal error. Its log holds the details under this video's id."


@dataclass(eq=False)
class _Live:
    row: JobRow
    handle: GenerationHandle | None = None
    dropped: bool = False


class VideoRunner:
    def __init__(
        self,
        client: Client,
        jobs: JobStore,
        files: Files,
        settings: Settings,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.jobs = jobs
        self._client = client
        self._files = files
        self._settings = settings
        self._threads = threads
        self._live: dict[str, _Live] = {}
        self._queue: asyncio.Queue[_Live] = asyncio.Queue()
        self._slots = asyncio.Semaphore(_IN_FLIGHT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self._stopping = False
        self._outcomes: Counter[str] = Counter()
        self._took: deque[float] = deque(maxlen=20)

    async def start(self) -> None:
        """Take up the rows that an earlier server left."""
        for row in await self.jobs.recover():
            self._enter(row)
        self._dispatcher = asyncio.create_task(self._dispatch())

    async def add(self, row: JobRow) -> None:
        """Commit a new row and queue it; BusyError when enough are waiting."""
        waiting = self._waiting()
        if waiting >= self._settings.max_waiting_videos:
            raise BusyError(
                f"{waiting} videos are waiting, which is the limit.",
                retry_after=self._eta(),
            )
        live = _Live(row)
        self._live[row.id] = live  # before the first await: concurrent calls see each other
        try:
            await self.jobs.insert(row)
        except BaseException:
            del self._live[row.id]
            raise
        self._queue.put_nowait(live)

    def snapshot(self, job_id: str) -> Snapshot | None:
        """Where a job that the client knows stands; None for one that waits or has ended."""
        live = self._live.get(job_id)
        return live.handle.snapshot() if live and live.handle else None

    def position(self, job_id: str) -> int | None:
        """How many videos wait ahead of a waiting one."""
        ahead = 0
        for live in self._live.values():
            if live.row.id == job_id:
                return ahead if _waits(live) else None
            ahead += _waits(live)
        return None

    async def delete(self, job_id: str) -> None:
        """End a job if it lives, and forget its row and file; NotFoundError for an unknown id."""
        if not await self.jobs.delete(job_id):
            raise no_video()
        live = self._live.get(job_id)
        if live is not None:
            live.dropped = True
            if live.handle is not None:
                live.handle.cancel()
        remove_video_files(self._files, job_id)
        self._files.drop_inputs(job_id)

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

    def metrics(self) -> list[Metric]:
        waiting = self._waiting()
        states = {"queued": waiting, "in_progress": len(self._live) - waiting}
        return [
            *(Metric("videos", n, {"status": s}, "gauge") for s, n in states.items()),
            *(Metric("videos_total", n, {"outcome": o}) for o, n in sorted(self._outcomes.items())),
        ]

    def _waiting(self) -> int:
        return sum(_waits(live) for live in self._live.values())

    def _eta(self) -> int:
        """When to come back, in seconds; clients that were refused together return apart."""
        typical = statistics.median(self._took) if self._took else 5.0
        return round(min(max(typical * random.uniform(0.8, 1.2), 1), 110))

    def _enter(self, row: JobRow) -> None:
        live = _Live(row)
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
            live.handle = await self._submit(live)
        except Exception as error:
            await self._fail(live, error)
        if live.handle is None:
            self._leave(live)
        else:
            self._spawn(self._follow(live, live.handle))

    async def _submit(self, live: _Live) -> GenerationHandle | None:
        params = msgspec.convert(live.row.payload["params"], ResolvedParams)
        while not live.dropped:
            try:
                return await self._client.submit(
                    params, job_id=live.row.id, deadline=self._settings.video_timeout
                )
            except (BusyError, UnavailableError):
                await asyncio.sleep(_RETRY_SECONDS)
        return None

    async def _follow(self, live: _Live, handle: GenerationHandle) -> None:
        if live.dropped:
            handle.cancel()
        try:
            await self._mark_progress(live, handle)
            await self._finish(live, await handle.result())
        except Exception as error:
            await self._ended_badly(live, error)
        finally:
            self._leave(live)

    async def _ended_badly(self, live: _Live, error: Exception) -> None:
        if isinstance(error, NotFoundError):  # the row was deleted under the job
            if live.handle is not None:
                live.handle.cancel()
            remove_video_files(self._files, live.row.id)
        elif self._stopping and isinstance(error, SglError):
            pass  # the row keeps its state; the next server takes it up
        elif isinstance(error, UnavailableError) and error.code != "insufficient_storage":
            # No worker can be started now: that is not the fault of this job, so it waits.
            self._enter(live.row)
            await self._store(live, status="queued")
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

    async def _finish(self, live: _Live, generation: Generation) -> None:
        row = live.row
        write = partial(
            write_video_files,
            self._files,
            generation,
            row.payload,
            metadata=self._settings.metadata,
        )
        written = await asyncio.get_running_loop().run_in_executor(self._threads, write)
        await self.jobs.update(
            row.id,
            status="completed",
            progress=100,
            attempts=generation.attempt,
            completed_at=time.time(),
            files=written,
        )
        self._outcomes["completed"] += 1
        self._took.append(sum(generation.seconds.values()))

    async def _fail(self, live: _Live, error: Exception) -> None:
        ours = isinstance(error, SglError)
        if not ours:
            log.error("video %s failed", live.row.id, exc_info=error)
        code = error.code if isinstance(error, SglError) else "internal_error"
        message = str(error) if ours else _INTERNAL
        self._outcomes[code] += 1
        if live.handle is not None:
            live.handle.cancel()  # it may be the table that failed and not the job
        await self._store(
            live,
            status="failed",
            error={"code": code, "message": message},
            completed_at=time.time(),
        )

    async def _store(self, live: _Live, **changes: Any) -> None:
        """Change the row of a job that is over: nobody is left to hear of an error."""
        try:
            await self.jobs.update(live.row.id, **changes)
        except NotFoundError:
            pass  # deleted meanwhile
        except SglError as problem:
            log.error("the state of video %s cannot be stored: %s", live.row.id, problem)

    def _leave(self, live: _Live) -> None:
        if self._live.get(live.row.id) is live:  # else it waits again, as another entry
            del self._live[live.row.id]
        self._slots.release()


def _waits(live: _Live) -> bool:
    return live.handle is None or live.handle.snapshot().state == "queued"


def no_video() -> NotFoundError:
    return NotFoundError("There is no such video.", code="video_not_found", param="video_id")
