"""Copies of finished files in a bucket, made beside everything else.

The file in the data folder is the truth and stays; the copy gives it another URL. A bucket that is
down holds nothing up: its uploads wait, longer after every failure, also over a restart.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sgl_diffusion.base.errors import NotFoundError, SglError, UnavailableError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server.storage import Bucket

log = get_logger(__name__)
T = TypeVar("T")

_AT_ONCE = 2
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_COPIES_GONE = "copies_deleted"  # in the history of a job that is gone


class Uploads:
    """`changed` is told of every change of the job table; all else follows from it."""

    def __init__(self, bucket: Bucket, jobs: JobStore, folder_of: Callable[[str], Path]) -> None:
        self._bucket = bucket
        self._jobs = jobs
        self._folder_of = folder_of
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload")
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Event] = {}  # jobs whose files are to be copied
        self._dropped: set[str] = set()  # jobs whose copies are to be deleted
        self._tasks: list[asyncio.Task[None]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._pause = _FIRST_PAUSE

    async def start(self) -> None:
        """Go on where an earlier server stopped, with deletions for a day."""
        self._jobs.watch(self.changed)
        for job_id in await self._jobs.gone(_COPIES_GONE):
            self.changed(job_id, None)
        for row in await self._jobs.over():
            self.changed(row.id, row)
        self._tasks = [asyncio.create_task(self._work()) for _ in range(_AT_ONCE)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def changed(self, job_id: str, row: JobRow | None) -> None:
        """A row is new or different; None when it is gone."""
        if row is None:
            if job_id not in self._dropped:
                self._dropped.add(job_id)
                self._queue.put_nowait(job_id)
        elif row.status == "completed" and job_id not in self._waiting and _missing(row):
            self._waiting[job_id] = asyncio.Event()
            self._queue.put_nowait(job_id)

    async def settled(self, job_id: str, seconds: float) -> None:
        """Wait until the files of a job are copied, but no longer than `seconds`."""
        event = self._waiting.get(job_id)
        if event is not None:
            try:
                await asyncio.wait_for(event.wait(), seconds)
            except TimeoutError:
                pass

    def url(self, entry: dict[str, Any]) -> str | None:
        """The address of a file of a row in the bucket; None until it is there."""
        key = entry.get("remote")
        return None if key is None else self._bucket.url(key)

    def redirect(self, entry: dict[str, Any]) -> str | None:
        """An address for one download, also from a private bucket."""
        key = entry.get("remote")
        return None if key is None else self._bucket.signed_url(key)

    def metrics(self) -> list[Metric]:
        return [
            Metric("uploads_waiting", len(self._waiting), kind="gauge"),
            *(
                Metric("uploads_total", count, {"action": action, "outcome": outcome})
                for (action, outcome), count in sorted(self._counts.items())
            ),
        ]

    async def _work(self) -> None:
        while True:
            job_id = await self._queue.get()
            action = "delete" if job_id in self._dropped else "copy"
            # From now on a copy that is still being made has to be deleted once more.
            self._dropped.discard(job_id)
            try:
                await (self._drop(job_id) if action == "delete" else self._copy(job_id))
            except UnavailableError:
                self._counts[action, "failed"] += 1
                await asyncio.sleep(self._pause * random.uniform(0.8, 1.2))
                self._pause = min(self._pause * 2, _LONGEST_PAUSE)
                if action == "delete":
                    self._dropped.add(job_id)
                self._queue.put_nowait(job_id)
            except SglError as error:
                log.error("the files of %s cannot be copied: %s", job_id, error)
                self._settle(job_id)
            else:
                self._counts[action, "done"] += 1
                self._pause = _FIRST_PAUSE

    async def _copy(self, job_id: str) -> None:
        row = await self._jobs.get(job_id)
        if row is None or not _missing(row):
            self._settle(job_id)
            return
        folder = self._folder_of(row.kind)
        try:
            files = [dict(entry) for entry in row.files]
            for entry in files:
                if "remote" not in entry:
                    put = partial(self._bucket.put, folder / entry["name"])
                    entry["remote"] = await self._in_thread(put)
            await self._jobs.update(job_id, files=files)
        except (FileNotFoundError, NotFoundError):
            self.changed(job_id, None)  # deleted meanwhile: what was copied goes, too
        self._settle(job_id)

    async def _drop(self, job_id: str) -> None:
        await self._in_thread(lambda: self._bucket.drop(job_id))
        await self._jobs.note(job_id, _COPIES_GONE)
        self._settle(job_id)

    def _settle(self, job_id: str) -> None:
        event = self._waiting.pop(job_id, None)
        if event is not None:
            event.set()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _missing(row: JobRow) -> bool:
    return any("remote" not in entry for entry in row.files)
