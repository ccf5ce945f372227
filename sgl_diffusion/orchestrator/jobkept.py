"""What the job table keeps: how many bytes its files have, and which rows go next.

Every question is answered from an index or a counter: its cost is that of the answer.
"""

from __future__ import annotations

from typing import Any

from sgl_diffusion.orchestrator.jobrow import COLUMNS, JobRow, decode
from sgl_diffusion.orchestrator.sqldb import Database

_SELECT = f"SELECT {', '.join(COLUMNS)} FROM jobs"
_OVER = "status IN ('completed', 'failed')"


def kept_bytes(db: Database) -> int:
    """Of all files of all rows; triggers of the schema count them."""
    return int(db.execute("SELECT bytes FROM kept").fetchone()[0])


def due(db: Database, now: float, ended: float, limit: int) -> list[JobRow]:
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


def oldest(db: Database, limit: int, mine: str, values: dict[str, Any]) -> list[JobRow]:
    """Rows of this server with files, the first to end first."""
    where = f"files != '[]' AND {_OVER}{mine}"
    sql = f"{_SELECT} WHERE {where} ORDER BY completed_at, id LIMIT :limit"
    return [decode(found) for found in db.execute(sql, {**values, "limit": limit})]


def forget(db: Database, before: float) -> None:
    """Drop the tombstones of jobs that went before that time, and their history."""
    db.execute("DELETE FROM expired WHERE at <= ?", (before,))
    db.execute(
        "DELETE FROM events WHERE job_id IN (SELECT job_id FROM events "
        "WHERE kind IN ('deleted', 'expired') AND at <= ?)",
        (before,),
    )
