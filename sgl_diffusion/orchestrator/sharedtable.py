"""The job table as several nodes share it: each row is claimed by the node that works on it.

A claim is what a node must hold to change a row. It changes hands when its node is gone, or when a
job waits there while another node has nothing to do; whoever lost it hears of it with its next
change, as if the row were deleted.
"""

from __future__ import annotations

import json
from typing import Any

from sgl_diffusion.orchestrator.jobrow import COLUMNS, JobRow, decode
from sgl_diffusion.orchestrator.jobtable import JobTable
from sgl_diffusion.orchestrator.postgres import PostgresDatabase
from sgl_diffusion.orchestrator.sidecars import NoSidecars

_SELECT = f"SELECT {', '.join(f'jobs.{name}' for name in COLUMNS)} FROM jobs"
# A job that waited no longer than this may be about to begin where it is.
_SETTLED_SECONDS = 2.0


class SharedTable(JobTable):
    _mine = " AND id IN (SELECT job_id FROM claims WHERE node = :node)"

    def __init__(self, db: PostgresDatabase) -> None:
        super().__init__(db, NoSidecars())
        self._node = db.node
        self._session = db
        self._values = {"node": db.node}

    def kept_bytes(self) -> int:
        sql = "SELECT COALESCE(SUM(bytes), 0) FROM claims WHERE node = :node"
        return int(self._db.execute(sql, self._values).fetchone()[0])

    def claim(self, like: JobRow, most: int, here: list[str], now: float) -> list[JobRow]:
        """At most `most` waiting rows of other nodes, for the model and adapters of `like`: all of
        a node that is gone, else what waits there for a while."""
        taken = self._strays(here)
        most += len(taken)
        names = self._db.execute("SELECT name FROM nodes WHERE name != :node", self._values)
        for (name,) in names.fetchall() if most > len(taken) else ():
            with self._session.gone(name) as gone, self._transaction():
                settled = now if gone else now - _SETTLED_SECONDS
                rows = self._waiting(name, like, most - len(taken), settled, running=gone)
                taken += [row for row in map(self._take, rows) if row is not None]
        return taken

    def _strays(self, here: list[str]) -> list[JobRow]:
        """Our unfinished rows that are not among those `here`: left while the database was away."""
        sql = (
            f"{_SELECT} JOIN claims ON job_id = id WHERE claims.node = :node "
            "AND status IN ('queued', 'in_progress') AND NOT id = ANY(:here)"
        )
        found = self._db.execute(sql, {**self._values, "here": here}).fetchall()
        with self._transaction():
            rows = [self._interrupted(decode(one)) for one in found]
        return [row for row in rows if not row.over]

    def tell(self, job_id: str, progress: int) -> None:
        """Nothing if the row is not ours, or not running any more."""
        self._db.execute(
            "UPDATE jobs SET progress = :progress WHERE id = :id AND status = 'in_progress'"
            + self._mine,
            {**self._values, "id": job_id, "progress": progress},
        )

    def lost(self, ids: list[str]) -> list[str]:
        """Which of them this node does not hold any more: they are gone, or another has them."""
        if not ids:
            return []
        sql = "SELECT job_id FROM claims WHERE node = :node AND job_id = ANY(:ids)"
        held = {found[0] for found in self._db.execute(sql, {**self._values, "ids": ids})}
        return [one for one in ids if one not in held]

    def absent(self, ids: list[str]) -> list[str]:
        """Which of them have no row."""
        if not ids:
            return []
        there = {f[0] for f in self._db.execute("SELECT id FROM jobs WHERE id = ANY(?)", (ids,))}
        return [one for one in ids if one not in there]

    def elsewhere(self, job_id: str) -> bool:
        """Whether another node has its files."""
        sql = "SELECT node FROM claims WHERE job_id = ?"
        found = self._db.execute(sql, (job_id,)).fetchone()
        return found is not None and found[0] != self._node

    def _waiting(
        self, node: str, like: JobRow, most: int, before: float, *, running: bool
    ) -> list[JobRow]:
        states = ("queued", "in_progress") if running else ("queued",)
        sql = (
            f"{_SELECT} JOIN claims ON job_id = id WHERE claims.node = :from AND NOT bound "
            "AND status = ANY(:states) AND model = :model AND adapters = :adapters "
            "AND created_at <= :before ORDER BY created_at, id LIMIT :most"
        )
        values = {
            "from": node,
            "states": list(states),
            "model": like.model,
            "adapters": json.dumps(like.adapters),
            "before": before,
            "most": most,
        }
        return [decode(found) for found in self._db.execute(sql, values)]

    def _take(self, row: JobRow) -> JobRow | None:
        """Claim a row of another node; None for one that was interrupted too often."""
        values = {**self._values, "id": row.id}
        self._db.execute("UPDATE claims SET node = :node WHERE job_id = :id", values)
        if row.status == "in_progress":
            row = self._interrupted(row)
        else:
            self._note(row.id, "moved", row.attempts, {"to": self._node})
        return None if row.over else row

    def _holds(self, job_id: str) -> bool:
        return not self.lost([job_id])

    def _add(self, row: JobRow, bound: bool) -> None:
        super()._add(row, bound)
        self._db.execute(
            "INSERT INTO claims (job_id, node, bound, bytes) VALUES (?, ?, ?, ?)",
            (row.id, self._node, bound, _bytes(row)),
        )

    def _changed(self, row: JobRow, changes: dict[str, Any]) -> None:
        if "files" in changes:
            values = {"id": row.id, "bytes": _bytes(row)}
            self._db.execute("UPDATE claims SET bytes = :bytes WHERE job_id = :id", values)


def _bytes(row: JobRow) -> int:
    return sum(int(entry.get("bytes", 0)) for entry in row.files)
