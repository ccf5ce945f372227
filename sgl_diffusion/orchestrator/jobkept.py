"""What the job table keeps: how many bytes its files have, and which rows go next.

Every question is answered from an index or a counter: its cost is that of the answer.
"""

from __future__ import annotations

import sqlite3

from sgl_diffusion.orchestrator.jobrow import COLUMNS, JobRow, decode

_SELECT = f"SELECT {', '.join(COLUMNS)} FROM jobs"
_OVER = "status IN ('completed', 'failed')"


def kept_bytes(db: sqlite3.Connection) -> int:
    """Of all files of all rows; triggers of the schema count them."""
    return int(db.execute("SELECT bytes FROM kept").fetchone()[0])


def due(db: sqlite3.Connection, now: float, ended: float, limit: int) -> list[JobRow]:
    """Rows whose time is over: `expires_at` has come, or, without one, they ended by `ended`."""
    found = db.execute(
        f"{_SELECT} WHERE expires_at <= :now AND {_OVER} ORDER BY expires_at LIMIT :limit",
        {"now": now, "limit": limit},
    ).fetchall()
    found += db.execute(
        f"{_SELECT} WHERE expires_at IS NULL AND {_OVER} "
        "AND COALESCE(completed_at, created_at) <= :ended LIMIT :limit",
        {"ended": ended, "limit": limit},
    ).fetchall()
    return [decode(values) for values in found]


def oldest(db: sqlite3.Connection, limit: int) -> list[JobRow]:
    """Rows with files, the first to end first."""
    sql = f"{_SELECT} WHERE files != '[]' AND {_OVER} ORDER BY completed_at, id LIMIT ?"
    return [decode(values) for values in db.execute(sql, (limit,))]


def forget(db: sqlite3.Connection, before: float) -> None:
    """Drop the tombstones of jobs that went before that time, and their history."""
    db.execute("DELETE FROM expired WHERE at <= ?", (before,))
    db.execute(
        "DELETE FROM events WHERE job_id IN (SELECT job_id FROM events "
        "WHERE kind IN ('deleted', 'expired') AND at <= ?)",
        (before,),
    )
