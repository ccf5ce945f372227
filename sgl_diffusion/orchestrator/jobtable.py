"""The job table itself: what one thread does with one connection. `jobstore` is the way in.

Every write is one transaction that also adds to the append-only table of events, so that the
history of a job tells what happened to it even after its row is gone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from sgl_diffusion.base.errors import ConflictError, NotFoundError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator import jobkept
from sgl_diffusion.orchestrator.jobrow import COLUMNS, JobRow, decode, encode
from sgl_diffusion.orchestrator.sidecars import Keepsakes
from sgl_diffusion.orchestrator.sqldb import Database

log = get_logger(__name__)

MAX_INTERRUPTIONS = 20
IDEMPOTENCY_SECONDS = 24 * 3600.0
RETRY_SECONDS = 600.0
TOMBSTONE_SECONDS = 24 * 3600.0

_SELECT = f"SELECT {', '.join(COLUMNS)} FROM jobs"
_RESTARTED = {"code": "server_restarted", "message": "The server was restarted too often under it."}


class JobTable:
    # What narrows a question to the rows of this server, and its values: all rows are, here.
    _mine = ""
    _values: dict[str, Any] = {}

    def __init__(self, db: Database, sidecars: Keepsakes) -> None:
        self._db = db
        self._sidecars = sidecars
        self.commits, self.commit_seconds = 0, 0.0

    def close(self) -> None:
        self._db.close()

    def insert(self, row: JobRow, retried: bool, bound: bool = False) -> JobRow:
        """Store the row, or return the one that the same request made before. A row that is
        `bound` can only be worked on here."""
        with self._transaction():
            if earlier := self.earlier(row, retried):
                return earlier
            self._add(row, bound)
            self._note(row.id, "created", row.attempts)
            if row.over:
                self._note(row.id, row.status, row.attempts)
            self._sidecars.put(row)
        return row

    def rebuild(self) -> int:
        """Fill an empty table from the sidecars; returns how many rows came back."""
        count = 0
        with self._transaction():
            for row in self._sidecars.rows():
                self._add(row, bound=True)
                self._note(row.id, "rebuilt", row.attempts, {"status": row.status})
                count += 1
        return count

    def update(self, job_id: str, changes: dict[str, Any], detail: dict[str, Any]) -> JobRow:
        """Change columns. A job that is over keeps its status: NotFoundError if it is gone."""
        with self._transaction():
            row = self.get(job_id)
            if row is None or not self._holds(job_id):
                raise no_job(job_id)
            new = dataclasses.replace(row, **changes)
            if row.over and new.status != row.status:
                raise ConflictError(f"Job {job_id} is {row.status} already.")
            columns = ", ".join(f"{name} = :{name}" for name in changes)
            values = {**encode(changes), "id": job_id}
            self._db.execute(f"UPDATE jobs SET {columns} WHERE id = :id", values)
            self._changed(new, changes)
            if (new.status, new.attempts) != (row.status, row.attempts):
                if new.error is not None:
                    detail = {**detail, "code": new.error.get("code")}
                self._note(job_id, new.status, new.attempts, detail)
                self._remember(new)
        return new

    def get(self, job_id: str) -> JobRow | None:
        found = self._db.execute(f"{_SELECT} WHERE id = ?", (job_id,)).fetchone()
        return None if found is None else decode(found)

    def page(
        self,
        kind: str,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        status: str | None,
        owner: str | None,
    ) -> list[JobRow]:
        where, values = ["kind = :kind"], {"kind": kind, "limit": limit}
        for name, wanted in (("status", status), ("owner", owner)):
            if wanted is not None:
                where.append(f"{name} = :{name}")
                values[name] = wanted
        if after is not None:
            last = self.get(after)
            if last is None:
                raise no_job(after, param="after")
            compare = {"asc": ">", "desc": "<"}[order]
            where.append(f"(created_at, id) {compare} (:created_at, :last)")
            values |= {"created_at": last.created_at, "last": last.id}
        order_by = f"ORDER BY created_at {order}, id {order} LIMIT :limit"
        sql = f"{_SELECT} WHERE {' AND '.join(where)} {order_by}"
        return [decode(found) for found in self._db.execute(sql, values)]

    def over(self) -> list[JobRow]:
        """Jobs that have ended, the first to end first."""
        over = f"status IN ('completed', 'failed'){self._mine}"
        sql = f"{_SELECT} WHERE {over} ORDER BY completed_at, id"
        return [decode(found) for found in self._db.execute(sql, self._values)]

    def due(self, now: float, ended: float, limit: int) -> list[JobRow]:
        return jobkept.due(self._db, now, ended, limit)

    def oldest(self, limit: int) -> list[JobRow]:
        return jobkept.oldest(self._db, limit, self._mine, self._values)

    def kept_bytes(self) -> int:
        return jobkept.kept_bytes(self._db)

    def ids(self) -> set[str]:
        return {str(found[0]) for found in self._db.execute("SELECT id FROM jobs")}

    def delete(self, job_id: str) -> JobRow | None:
        with self._transaction():
            row = self.get(job_id)
            if row is not None:
                self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
                self._note(job_id, "deleted", row.attempts)
        if row is not None:
            self._sidecars.drop(job_id)
        return row

    def expire(self, job_id: str, why: str) -> bool:
        """Delete a row, but remember for a day that there was one."""
        with self._transaction():
            row = self.get(job_id)
            if row is None:
                return False
            self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            self._db.execute(
                "INSERT INTO expired VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "kind = excluded.kind, owner = excluded.owner, at = excluded.at",
                (job_id, row.kind, row.owner, time.time()),
            )
            self._note(job_id, "expired", row.attempts, {"why": why})
        self._sidecars.drop(job_id)
        return True

    def expired(self, job_id: str, owner: str | None) -> bool:
        sql = "SELECT owner FROM expired WHERE id = ? AND at > ?"
        found = self._db.execute(sql, (job_id, time.time() - TOMBSTONE_SECONDS)).fetchone()
        return found is not None and owner in (None, found[0])

    def note(self, job_id: str, kind: str) -> None:
        """Add to the history of a job, also of one that is gone."""
        with self._transaction():
            self._note(job_id, kind, 0)

    def gone(self, noted: str) -> list[str]:
        """Jobs that left lately without `noted` in their history, the first to leave first."""
        sql = (
            "SELECT job_id FROM events WHERE kind IN ('deleted', 'expired') AND job_id NOT IN "
            "(SELECT job_id FROM events WHERE kind = ?) ORDER BY number"
        )
        return [str(found[0]) for found in self._db.execute(sql, (noted,))]

    def prune(self) -> None:
        """Forget the tombstones of yesterday, and the history of jobs that left no trace else."""
        with self._transaction():
            jobkept.forget(self._db, time.time() - TOMBSTONE_SECONDS)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        sql = "SELECT at, kind, attempt, detail FROM events WHERE job_id = ? ORDER BY number"
        return [
            {"at": at, "kind": kind, "attempt": attempt, **json.loads(detail)}
            for at, kind, attempt, detail in self._db.execute(sql, (job_id,))
        ]

    def recover(self) -> list[JobRow]:
        with self._transaction():
            running = f"{_SELECT} WHERE status = 'in_progress'{self._mine}"
            for found in self._db.execute(running, self._values).fetchall():
                self._interrupted(decode(found))
        sql = f"{_SELECT} WHERE status = 'queued'{self._mine} ORDER BY created_at, id"
        return [decode(found) for found in self._db.execute(sql, self._values)]

    def _interrupted(self, row: JobRow) -> JobRow:
        """A running row whose server is gone: back in the queue, or failed if that was too often.
        Part of a transaction."""
        count = row.interruptions + 1
        changes: dict[str, Any] = {"interruptions": count, "progress": 0, "status": "queued"}
        if count > MAX_INTERRUPTIONS:
            changes |= {"status": "failed", "error": _RESTARTED, "completed_at": time.time()}
        columns = ", ".join(f"{name} = :{name}" for name in changes)
        values = {**encode(changes), "id": row.id}
        self._db.execute(f"UPDATE jobs SET {columns} WHERE id = :id", values)
        self._note(row.id, changes["status"], row.attempts, {"interruptions": count})
        new = dataclasses.replace(row, **changes)
        self._remember(new)
        return new

    def earlier(self, row: JobRow, retried: bool) -> JobRow | None:
        """The row that the same request made before."""
        values = {"kind": row.kind, "owner": row.owner, "now": row.created_at}
        same = f"{_SELECT} WHERE kind = :kind AND owner = :owner"
        if row.idempotency_key is not None:
            values |= {"key": row.idempotency_key, "age": IDEMPOTENCY_SECONDS}
            sql = f"{same} AND idempotency_key = :key AND created_at > :now - :age"
            found = self._db.execute(f"{sql} ORDER BY created_at DESC", values).fetchone()
            if found is not None:
                earlier = decode(found)
                if earlier.body_hash != row.body_hash:
                    raise key_reused()
                return earlier
        elif retried:
            values |= {"hash": row.body_hash, "age": RETRY_SECONDS}
            sql = f"{same} AND body_hash = :hash AND created_at > :now - :age"
            found = self._db.execute(f"{sql} ORDER BY created_at DESC", values).fetchone()
            return None if found is None else decode(found)
        return None

    def _holds(self, job_id: str) -> bool:
        """Whether this server may change the row."""
        return True

    def _changed(self, row: JobRow, changes: dict[str, Any]) -> None:
        """What else follows a change, in its transaction."""

    def _add(self, row: JobRow, bound: bool) -> None:
        marks = ", ".join(f":{name}" for name in COLUMNS)
        sql = f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({marks})"
        self._db.execute(sql, encode(dataclasses.asdict(row)))

    def _note(self, job_id: str, kind: str, attempt: int, detail: Any = None) -> None:
        self._db.execute(
            "INSERT INTO events (job_id, at, kind, attempt, detail) VALUES (?, ?, ?, ?, ?)",
            (job_id, time.time(), kind, attempt, json.dumps(detail or {})),
        )

    def _remember(self, row: JobRow) -> None:
        """The sidecar follows. It only serves a damaged database, so it may lag on a full disk."""
        try:
            self._sidecars.put(row)
        except OSError as error:
            log.error("the sidecar of job %s cannot be written: %s", row.id, error)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        started = time.monotonic()
        with self._db.transaction():
            yield
        self.commits += 1
        self.commit_seconds += time.monotonic() - started


def no_job(job_id: str, param: str | None = None) -> NotFoundError:
    return NotFoundError(f"There is no job {job_id!r}.", param=param)


def key_reused() -> ConflictError:
    return ConflictError(
        "This Idempotency-Key was sent with another body.",
        hint="Use a fresh key for a new request.",
        code="idempotency_key_reused",
    )
