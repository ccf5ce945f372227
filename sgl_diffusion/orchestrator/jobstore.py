"""Durable jobs: rows in SQLite with a sidecar file beside each, or in a database that several
servers share.

One connection, owned by one thread; a call returns after the commit reached the disk. A lock file
keeps a second server out of the data folder.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sgl_diffusion.base.errors import SetupError, UnavailableError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator import datalock
from sgl_diffusion.orchestrator.jobdb import open_database
from sgl_diffusion.orchestrator.jobrow import COLUMNS, JobRow
from sgl_diffusion.orchestrator.jobtable import MAX_INTERRUPTIONS, JobTable
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.orchestrator.sidecars import Sidecars
from sgl_diffusion.orchestrator.sqldb import SqliteDatabase

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.sharedtable import SharedTable

__all__ = ["MAX_INTERRUPTIONS", "JobRow", "JobStore", "Rows"]

log = get_logger(__name__)
T = TypeVar("T")
R = TypeVar("R", bound=JobRow | None)
# Inside JobStore, `list` is its method.
Rows = list[JobRow]
Names = list[str]
History = list[dict[str, Any]]
Samples = list[Metric]
Watchers = list[Callable[[str, JobRow | None], None]]


class JobStore:
    """`JobStore.open(folder)`; every method but `open` may be called from any task of one loop."""

    def __init__(self, folder: Path, url: str | None = None, node: str = "") -> None:
        self._folder = folder
        self._url, self._node = url, node
        self._lock = datalock.lock(folder)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobstore")
        self._table: JobTable
        self._errors: tuple[type[Exception], ...] = (sqlite3.Error,)
        self._refusals: tuple[type[Exception], ...] = ()
        self._peers: SharedTable  # the same table, where others share it
        self._watchers: Watchers = []
        self._known = _Known()

    @classmethod
    async def open(cls, folder: Path, url: str | None = None, node: str = "") -> JobStore:
        """Lock the folder and open its database; SetupError names the server that holds it. With
        the `url` of a database the rows are there, and this server is `node` among its peers."""
        store = cls(folder, url, node)
        try:
            await store._run(store._connect)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        if self._lock >= 0:
            if hasattr(self, "_table"):
                await self._run(self._table.close)
            self._thread.shutdown()
            os.close(self._lock)
            self._lock = -1

    @property
    def shared(self) -> bool:
        """Whether other servers work on the rows, too."""
        return self._url is not None

    async def insert(self, row: JobRow, *, retried: bool = False, bound: bool = False) -> JobRow:
        """Store a new row, or return the one that the same request made before: within a day under
        the same `idempotency_key` (ConflictError if the body differs), or, with `retried`, one of
        the same owner and body within ten minutes. It is on disk when this returns. What is `bound`
        no other server can work on."""
        stored = await self._run(lambda: self._table.insert(row, retried, bound))
        return self._tell(stored.id, stored)

    async def earlier(self, row: JobRow, *, retried: bool = False) -> JobRow | None:
        """What `insert` would return instead of storing `row`."""
        return await self._run(lambda: self._table.earlier(row, retried))

    async def update(
        self, job_id: str, *, why: dict[str, Any] | None = None, **changes: Any
    ) -> JobRow:
        """Change columns of a row; NotFoundError if it is gone, ConflictError if the change would
        bring a job to life that is over. `why` goes into the job's history."""
        assert changes and set(changes) < set(COLUMNS) - {"id"}, f"not columns: {set(changes)}"
        row = await self._run(
            lambda: self._known.put(self._table.update(job_id, changes, why or {}))
        )
        return self._tell(job_id, row)

    async def get(self, job_id: str) -> JobRow | None:
        """A row; clients that poll get it from memory. Nobody may change what is in it."""
        known = None if self.shared else self._known.get(job_id)
        return known or await self._run(lambda: self._read(job_id))

    async def list(
        self,
        kind: str,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        status: str | None = None,
        owner: str | None = None,
    ) -> Rows:
        """Rows of one kind by age, the newest first; `after` is the id of the last one seen."""
        return await self._run(
            lambda: self._table.page(kind, after, limit, order, status, owner),
        )

    async def over(self) -> Rows:
        """Jobs that are completed or failed, in the order of their end."""
        return await self._run(lambda: self._table.over())

    async def due(self, now: float, ended: float, limit: int) -> Rows:
        """At most about `limit` rows that are due: `expires_at` has come, or, without one, they
        ended before `ended`."""
        return await self._run(lambda: self._table.due(now, ended, limit))

    async def oldest(self, limit: int) -> Rows:
        """Jobs that are over and have files, the first to end first."""
        return await self._run(lambda: self._table.oldest(limit))

    async def kept_bytes(self) -> int:
        """Of the files of all rows."""
        return await self._run(lambda: self._table.kept_bytes())

    async def ids(self) -> set[str]:
        return await self._run(lambda: self._table.ids())

    async def delete(self, job_id: str) -> bool:
        gone = await self._run(lambda: self._table.delete(self._known.drop(job_id))) is not None
        self._tell(job_id, None)
        return gone

    async def expire(self, job_id: str, why: str) -> bool:
        """Delete a row for good reasons of the server; `expired` knows of it for a day."""
        gone = await self._run(lambda: self._table.expire(self._known.drop(job_id), why))
        self._tell(job_id, None)
        return gone

    async def expired(self, job_id: str, owner: str | None = None) -> bool:
        """Whether there was such a job until a day ago at most."""
        return await self._run(lambda: self._table.expired(job_id, owner))

    async def note(self, job_id: str, kind: str) -> None:
        """Add to the history of a job, also of one that is gone."""
        await self._run(lambda: self._table.note(job_id, kind))

    async def gone(self, noted: str) -> Names:
        """Ids of jobs that were deleted or expired within a day and have no event `noted`."""
        return await self._run(lambda: self._table.gone(noted))

    async def prune(self) -> None:
        """Forget what nobody can ask for any more."""
        await self._run(lambda: self._table.prune())

    async def events(self, job_id: str) -> History:
        """What happened to a job, oldest first; also known after its row is gone."""
        return await self._run(lambda: self._table.events(job_id))

    async def recover(self) -> Rows:
        """At start: rows in progress go back to the queue. Returns all queued rows, oldest first.

        A row that was interrupted too often fails, so that it cannot take every server down.
        """
        return await self._run(self._recover)

    async def claim(self, like: JobRow, most: int, here: Names) -> Rows:
        """Take over at most `most` waiting rows, for the model and adapters of `like`, from other
        servers, and all unfinished ones of ours that are not among those `here`."""
        return await self._run(lambda: self._peers.claim(like, most, here, time.time()))

    async def tell(self, job_id: str, progress: int) -> None:
        """Let clients of other servers know how far a job is."""
        await self._run(lambda: self._peers.tell(job_id, progress))

    async def lost(self, ids: Names) -> Names:
        """Which of these rows this server does not hold any more."""
        return await self._run(lambda: self._peers.lost(ids))

    async def absent(self, ids: Names) -> Names:
        """Which of these ids no server has a row of."""
        return await self._run(lambda: self._peers.absent(ids))

    async def elsewhere(self, job_id: str) -> bool:
        """Whether the files of a job are with another server."""
        return self.shared and await self._run(lambda: self._peers.elsewhere(job_id))

    def watch(self, watcher: Callable[[str, JobRow | None], None]) -> None:
        """Call `watcher` with every row that was stored, and with None for one that went. It runs
        in the event loop and must neither wait nor fail."""
        self._watchers.append(watcher)

    def metrics(self) -> Samples:
        return [
            Metric("db_commit_seconds_count", self._table.commits),
            Metric("db_commit_seconds_sum", self._table.commit_seconds),
        ]

    def _recover(self) -> Rows:
        self._known.rows.clear()
        return self._table.recover()

    def _read(self, job_id: str) -> JobRow | None:
        row = self._table.get(job_id)
        return None if row is None else self._known.put(row)

    def _tell(self, job_id: str, row: R) -> R:
        for watcher in self._watchers:
            watcher(job_id, row)
        return row

    async def _run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        failures: tuple[type[Exception], ...] = (*self._errors, OSError)
        try:
            return await loop.run_in_executor(self._thread, work)
        except self._refusals:
            raise
        except failures as error:
            log.error("the job database failed: %s", error)
            raise UnavailableError(
                "The server cannot store jobs now.",
                hint="Its log says why; a full disk is the usual reason.",
                code="insufficient_storage",
            ) from error

    def _connect(self) -> None:
        self._table = self._open_shared() if self._url is not None else self._open_own()

    def _open_shared(self) -> JobTable:
        from sgl_diffusion.orchestrator.postgres import PostgresDatabase
        from sgl_diffusion.orchestrator.sharedtable import SharedTable

        assert self._url is not None
        db = PostgresDatabase(self._url, self._node)
        self._errors, self._refusals = db.failures, db.refusals
        self._peers = SharedTable(db)
        return self._peers

    def _open_own(self) -> JobTable:
        path = self._folder / "jobs.db"
        try:
            sidecars = Sidecars(self._folder)
            connection, fresh = open_database(path)
        except (sqlite3.Error, OSError) as error:
            raise SetupError(
                f"The job database {path} cannot be opened: {error}.",
                hint="Check its permissions and the free space, or use another --data-dir.",
            ) from error
        db = SqliteDatabase(connection)
        self._errors, self._refusals = db.failures, db.refusals
        table = JobTable(db, sidecars)
        if fresh and (count := table.rebuild()):
            log.warning("%d jobs were rebuilt from their sidecars", count)
        sidecars.sweep(table.ids())
        return table


class _Known:
    """Rows read or written lately. Only the thread that owns the table changes this, in the order
    of its work, so a row in here is the one in the table; the event loop looks things up."""

    def __init__(self, most: int = 256) -> None:
        self.rows: OrderedDict[str, JobRow] = OrderedDict()
        self._most = most

    def get(self, job_id: str) -> JobRow | None:
        return self.rows.get(job_id)

    def put(self, row: JobRow) -> JobRow:
        self.rows[row.id] = row
        self.rows.move_to_end(row.id)
        if len(self.rows) > self._most:
            self.rows.popitem(last=False)
        return row

    def drop(self, job_id: str) -> str:
        self.rows.pop(job_id, None)
        return job_id
