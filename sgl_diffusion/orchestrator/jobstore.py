"""Durable rows of background jobs, in SQLite.

One connection, owned by one thread; a call returns after the commit reached the disk. A lock file
keeps a second server out of the data folder.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from sgl_diffusion.base.errors import NotFoundError, SetupError, UnavailableError
from sgl_diffusion.base.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")

MAX_INTERRUPTIONS = 20

# Entry i takes the schema from version i to i + 1; entries are never edited, only added.
_MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
        payload TEXT NOT NULL,
        progress INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        interruptions INTEGER NOT NULL,
        created_at REAL NOT NULL,
        completed_at REAL,
        error TEXT,
        files TEXT NOT NULL
    );
    CREATE INDEX jobs_by_age ON jobs (kind, created_at, id);
    """,
)


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """One background job. `payload`, `error` and `files` are any JSON; stamps are wall clock.

    `attempts` counts runs that a worker began; `interruptions` counts server restarts under it.
    """

    id: str
    kind: str
    payload: dict[str, Any]
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    attempts: int = 0
    interruptions: int = 0
    created_at: float = field(default_factory=time.time)
    completed_at: float | None = None
    error: dict[str, Any] | None = None
    files: list[dict[str, Any]] = field(default_factory=list)


Rows = list[JobRow]  # inside JobStore, `list` is its method

_COLUMNS = tuple(f.name for f in dataclasses.fields(JobRow))
_JSON = frozenset({"payload", "error", "files"})


class JobStore:
    """`JobStore.open(folder)`; every method but `open` may be called from any task of one loop."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "jobs.db"
        self._lock = _lock(folder)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobstore")
        self._db: sqlite3.Connection

    @classmethod
    async def open(cls, folder: Path) -> JobStore:
        """Lock the folder and open its database; SetupError names the server that holds it."""
        store = cls(folder)
        try:
            await store._run(store._connect)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        def close() -> None:
            if hasattr(self, "_db"):
                self._db.close()

        if self._lock >= 0:
            await self._run(close)
            self._thread.shutdown()
            os.close(self._lock)
            self._lock = -1

    async def insert(self, row: JobRow) -> None:
        """Store a new row; it is on disk when this returns."""
        values = _encode(dataclasses.asdict(row))
        marks = ", ".join(f":{name}" for name in _COLUMNS)
        sql = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({marks})"
        await self._run(lambda: self._write(sql, values))

    async def update(self, job_id: str, **changes: Any) -> None:
        """Change columns of a row; NotFoundError if it is gone."""
        assert changes and set(changes) < set(_COLUMNS) - {"id"}, f"not columns: {set(changes)}"
        columns = ", ".join(f"{name} = :{name}" for name in changes)
        values = {**_encode(changes), "id": job_id}
        sql = f"UPDATE jobs SET {columns} WHERE id = :id"
        if not await self._run(lambda: self._write(sql, values)):
            raise _no_job(job_id)

    async def get(self, job_id: str) -> JobRow | None:
        sql = f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE id = ?"
        found = await self._run(lambda: self._db.execute(sql, (job_id,)).fetchone())
        return None if found is None else _row(found)

    async def list(
        self,
        kind: str,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        status: str | None = None,
    ) -> Rows:
        """Rows of one kind by age, the newest first; `after` is the id of the last one seen."""
        compare = {"asc": ">", "desc": "<"}[order]
        where, values = ["kind = :kind"], {"kind": kind, "limit": limit}
        if status is not None:
            where.append("status = :status")
            values["status"] = status
        if after is not None:
            last = await self.get(after)
            if last is None:
                raise _no_job(after, param="after")
            where.append(f"(created_at, id) {compare} (:created_at, :last)")
            values |= {"created_at": last.created_at, "last": last.id}
        sql = (
            f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE {' AND '.join(where)} "
            f"ORDER BY created_at {order}, id {order} LIMIT :limit"
        )
        found = await self._run(lambda: self._db.execute(sql, values).fetchall())
        return [_row(values) for values in found]

    async def delete(self, job_id: str) -> bool:
        sql = "DELETE FROM jobs WHERE id = :id"
        return bool(await self._run(lambda: self._write(sql, {"id": job_id})))

    async def recover(self) -> Rows:
        """At start: rows in progress go back to the queue. Returns all queued rows, oldest first.

        A row that was interrupted too often fails, so that it cannot take every server down.
        """
        return await self._run(self._recover)

    def _recover(self) -> Rows:
        error = json.dumps(
            {"code": "server_restarted", "message": "The server was restarted too often under it."}
        )
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "UPDATE jobs SET status = 'queued', progress = 0, interruptions = interruptions + 1"
                " WHERE status = 'in_progress'"
            )
            self._db.execute(
                "UPDATE jobs SET status = 'failed', error = ?, completed_at = ?"
                " WHERE status = 'queued' AND interruptions > ?",
                (error, time.time(), MAX_INTERRUPTIONS),
            )
        sql = f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE status = 'queued'"
        return [_row(found) for found in self._db.execute(f"{sql} ORDER BY created_at, id")]

    def _write(self, sql: str, values: dict[str, Any]) -> int:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            return self._db.execute(sql, values).rowcount

    async def _run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            log.error("the job database failed: %s", error)
            raise UnavailableError(
                "The server cannot store jobs now.",
                hint="Its log says why; a full disk is the usual reason.",
                code="insufficient_storage",
            ) from error

    def _connect(self) -> None:
        try:
            self._open_database()
        except sqlite3.Error as error:
            raise SetupError(
                f"The job database {self._path} cannot be opened: {error}.",
                hint="Check its permissions and the free space, or use another --data-dir.",
            ) from error

    def _open_database(self) -> None:
        if self._path.exists() and not _sound(self._path):
            _move_aside(self._path)
        # No implicit transactions: every write says BEGIN IMMEDIATE itself.
        self._db = sqlite3.connect(self._path, isolation_level=None)
        for pragma in ("busy_timeout = 5000", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise SetupError(
                f"{self._path} was written by a newer version of this package.",
                hint="Upgrade, or use another --data-dir.",
            )
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")


def _encode(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value) if name in _JSON and value is not None else value
        for name, value in values.items()
    }


def _row(values: tuple[Any, ...]) -> JobRow:
    fields = dict(zip(_COLUMNS, values, strict=True))
    for name in _JSON:
        if fields[name] is not None:
            fields[name] = json.loads(fields[name])
    return JobRow(**fields)


def _no_job(job_id: str, param: str | None = None) -> NotFoundError:
    return NotFoundError(f"There is no job {job_id!r}.", param=param)


def _sound(path: Path) -> bool:
    try:
        db = sqlite3.connect(path)
        try:
            return bool(db.execute("PRAGMA quick_check").fetchone() == ("ok",))
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        # Only real damage counts: a file we may not read is no reason to begin a new one.
        if not error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise
        return False


def _move_aside(path: Path) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(path.with_name(f"{path.name}{suffix}.corrupt-{stamp}"))
    log.error("%s was damaged; it is kept as %s.corrupt-%s", path, path.name, stamp)


def _lock(folder: Path) -> int:
    """An open, locked descriptor of `folder`/lock; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SetupError(
            f"The data folder {folder} cannot be used: {error.strerror}.",
            hint="Give a folder you may write to with --data-dir.",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise SetupError(
            f"The data folder {folder} is used by process {owner}.",
            hint="Stop that server, or give another folder with --data-dir.",
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
