"""What the job table keeps: counted as rows come and go, and found without reading the rest."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from sgl_diffusion.orchestrator import jobdb, jobkept, jobtable
from sgl_diffusion.orchestrator.jobstore import JobStore
from tests.orchestrator.test_jobstore import row, with_store

DAY = 24 * 3600.0


def files(*sizes: int) -> list[dict[str, object]]:
    return [{"name": f"{size}.mp4", "bytes": size} for size in sizes]


def test_bytes_are_counted_as_rows_come_change_and_go(tmp_path: Path, url: str | None) -> None:
    async def scenario(store: JobStore) -> None:
        assert await store.kept_bytes() == 0
        for number, sizes in enumerate([(5, 7), (), (11,), (13,)]):
            await store.insert(row(number, status="completed", files=files(*sizes)))
        assert await store.kept_bytes() == 36
        await store.update("video_001", files=files(100), progress=100)
        await store.update("video_000", files=files(5))
        await store.update("video_002", attempts=2)
        assert await store.kept_bytes() == 129
        await store.delete("video_003")
        await store.expire("video_001", "age")
        assert await store.kept_bytes() == 16

    async def again(store: JobStore) -> None:
        assert await store.kept_bytes() == 16

    with_store(tmp_path, scenario, url)
    with_store(tmp_path, again, url)


def test_rows_of_an_older_database_are_counted(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    for number, script in enumerate(jobdb._MIGRATIONS[:2], 1):
        db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
    for name, listed in (("a", '[{"bytes": 3}, {"bytes": 4}]'), ("b", "[]"), ("c", "[{}]")):
        db.execute(
            "INSERT INTO jobs (id, kind, status, payload, progress, attempts, interruptions,"
            " created_at, files) VALUES (?, 'video', 'completed', '{}', 100, 1, 0, 1.0, ?)",
            (name, listed),
        )
    db.close()

    async def scenario(store: JobStore) -> None:
        assert await store.kept_bytes() == 7
        await store.delete("a")
        await store.delete("c")
        assert await store.kept_bytes() == 0

    with_store(tmp_path, scenario)


def test_what_is_due_and_what_is_oldest(tmp_path: Path, url: str | None) -> None:
    async def scenario(store: JobStore) -> None:
        over = {"status": "completed", "files": files(1)}
        await store.insert(row(0, **over, completed_at=30.0, expires_at=500.0))
        await store.insert(row(1, **over, completed_at=20.0, expires_at=900.0))
        await store.insert(row(2, status="failed", completed_at=100.0))
        await store.insert(row(3, status="failed", completed_at=400.0))
        await store.insert(row(4))
        await store.insert(row(5, status="in_progress"))

        async def due(now: float, ended: float) -> set[str]:
            return {found.id[-1] for found in await store.due(now, ended, 10)}

        assert await due(499.0, 99.0) == set()
        assert await due(500.0, 100.0) == {"0", "2"}
        assert await due(900.0, 10_000.0) == {"0", "1", "2", "3"}
        assert [found.id[-1] for found in await store.oldest(10)] == ["1", "0"]
        assert [found.id[-1] for found in await store.oldest(1)] == ["1"]

    with_store(tmp_path, scenario, url)


def test_a_look_costs_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement walks through a table, and rows that stay are not decoded."""
    decoded: list[str] = []
    decode = jobkept.decode

    def counted(values: tuple[object, ...]) -> object:
        decoded.append(str(values[0]))
        return decode(values)

    async def scenario(store: JobStore) -> None:
        now = time.time()
        for number in range(40):
            at = now if number else now - 3 * DAY
            done = {"status": "completed", "files": files(1)}
            await store.insert(row(number, **done, completed_at=at, expires_at=at + DAY))
        db: sqlite3.Connection = store._table._db.connection
        asked: list[str] = []

        def look() -> None:
            db.set_trace_callback(asked.append)
            store._table.due(now, now - DAY, 100)
            store._table.oldest(1)
            store._table.kept_bytes()
            store._table.prune()
            db.set_trace_callback(None)

        monkeypatch.setattr(jobkept, "decode", counted)
        await store._run(look)
        assert decoded == ["video_000", "video_000"]  # it is due, and the oldest
        statements = [sql for sql in asked if sql.startswith(("SELECT", "DELETE"))]
        assert len(statements) >= 6

        def plans() -> list[str]:
            return [
                str(step[3])
                for sql in statements
                for step in db.execute(f"EXPLAIN QUERY PLAN {sql}")
            ]

        found = await store._run(plans)
        walks = [step for step in found if step.startswith("SCAN") and "USING INDEX" not in step]
        assert walks == ["SCAN kept"], found
        assert any("jobs_by_end" in step for step in found)

    with_store(tmp_path, scenario)


def test_the_history_goes_a_day_after_its_job(
    tmp_path: Path, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(store: JobStore) -> None:
        for number in range(3):
            await store.insert(row(number))
        await store.delete("video_000")
        await store.expire("video_001", "age")
        await store.note("video_000", "copies gone")
        await store.prune()
        assert [len(await store.events(f"video_{n:03}")) for n in range(3)] == [3, 2, 1]
        monkeypatch.setattr(jobtable, "TOMBSTONE_SECONDS", 0.0)
        await store.prune()
        assert [len(await store.events(f"video_{n:03}")) for n in range(3)] == [0, 0, 1]

    with_store(tmp_path, scenario, url)
