"""Rows of several nodes: who holds them, who may take them over, and sessions that break."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.base.errors import NotFoundError, SetupError, UnavailableError
from sgl_diffusion.orchestrator.jobstore import MAX_INTERRUPTIONS, JobRow, JobStore
from tests import postgres

LIKE = JobRow(id="", kind="video", payload={}, model="wan", adapters=[])


@pytest.fixture
def shared(database: str) -> str:
    postgres.fresh(database)
    return database


def row(number: int, **fields: Any) -> JobRow:
    """One that has waited for long."""
    made = JobRow(id=f"video_{number:03}", kind="video", payload={}, model="wan")
    return dataclasses.replace(made, **{"created_at": 1000.0 + number, **fields})


def story(
    folder: Path, url: str, scenario: Callable[[JobStore, JobStore], Awaitable[None]]
) -> None:
    """Two nodes, a and b; one may be closed by the scenario."""

    async def told() -> None:
        stores = [await JobStore.open(folder / name, url, name) for name in "ab"]
        try:
            await scenario(*stores)
        finally:
            for store in stores:
                await store.close()

    asyncio.run(told())


def ids(rows: list[JobRow]) -> list[str]:
    return [found.id[-1] for found in rows]


def test_what_waits_elsewhere_is_taken_oldest_first(tmp_path: Path, shared: str) -> None:
    async def scenario(a: JobStore, b: JobStore) -> None:
        for number in range(4):
            await a.insert(row(number))
        await a.insert(row(4, model="flux"))
        await a.insert(row(5, adapters=[{"nickname": "ink"}]))
        await a.insert(row(6), bound=True)
        await a.insert(row(7, created_at=time.time() + 3600))  # young: it may be about to begin
        await a.update("video_000", status="in_progress", attempts=1)
        mine = [f"video_{number:03}" for number in range(8)]  # what b works on, as it says
        assert await b.claim(LIKE, 0, mine) == []
        assert ids(await b.claim(LIKE, 2, mine)) == ["1", "2"]
        assert ids(await b.claim(LIKE, 9, mine)) == ["3"]
        assert await b.claim(LIKE, 9, mine) == []
        ink = dataclasses.replace(LIKE, adapters=[{"nickname": "ink"}])
        assert ids(await b.claim(ink, 9, mine)) == ["5"]
        held = [f"video_{number:03}" for number in range(8)]
        assert await a.lost(held) == [held[1], held[2], held[3], held[5]]
        with pytest.raises(NotFoundError):
            await a.update("video_001", status="in_progress")
        await b.update("video_001", status="in_progress", attempts=1)
        assert (await a.get("video_001")).status == "in_progress", "nothing old from memory"

    story(tmp_path, shared, scenario)


def test_the_rows_of_a_node_that_is_gone(tmp_path: Path, shared: str) -> None:
    async def scenario(a: JobStore, b: JobStore) -> None:
        await a.insert(row(0))
        await a.insert(row(1))
        await a.insert(row(2, interruptions=MAX_INTERRUPTIONS))
        await a.insert(row(3), bound=True)
        for number in (0, 2):
            await a.update(f"video_{number:03}", status="in_progress", progress=40)
        assert ids(await b.claim(LIKE, 9, [])) == ["1"], (
            "it is alive: what it works on stays with it"
        )
        await a.close()
        for _ in range(100):  # the database hears of it when it comes to it
            if taken := await b.claim(LIKE, 9, ["video_001"]):
                break
            await asyncio.sleep(0.1)
        assert ids(taken) == ["0"] and taken[0].status == "queued" and taken[0].interruptions == 1
        assert (await b.get("video_002")).error["code"] == "server_restarted"
        assert (await b.get("video_003")).status == "queued", "only its own server can make it"
        again = await JobStore.open(tmp_path / "a", shared, "a")
        try:
            assert ids(await again.recover()) == ["3"]
        finally:
            await again.close()

    story(tmp_path, shared, scenario)


def test_files_belong_to_the_node_that_made_them(tmp_path: Path, shared: str) -> None:
    async def scenario(a: JobStore, b: JobStore) -> None:
        over = {"status": "completed", "completed_at": 5.0}
        await a.insert(row(0, **over, files=[{"name": "0.mp4", "bytes": 70}]))
        await b.insert(row(1, **over, files=[{"name": "1.mp4", "bytes": 30}]))
        assert [await a.kept_bytes(), await b.kept_bytes()] == [70, 30]
        await a.update("video_000", files=[{"name": "0.mp4", "bytes": 7}])
        assert ids(await a.oldest(9)) == ["0"] and await a.kept_bytes() == 7
        assert [ids(await a.over()), ids(await b.over())] == [["0"], ["1"]]
        assert await b.elsewhere("video_000") and not await a.elsewhere("video_000")
        assert ids(await b.list("video", order="asc")) == ["0", "1"], "clients see all"
        assert await b.delete("video_000")
        assert await a.kept_bytes() == 0
        assert await a.absent(["video_000", "video_001"]) == ["video_000"]
        await a.insert(row(2, status="in_progress"))
        await b.tell("video_002", 30)
        assert (await b.get("video_002")).progress == 0, "only its node knows"
        await a.tell("video_002", 40)
        assert (await b.get("video_002")).progress == 40

    story(tmp_path, shared, scenario)


def test_a_session_that_breaks_is_made_anew(
    tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    async def scenario(a: JobStore, b: JobStore) -> None:
        await a.insert(row(0))
        with psycopg.connect(shared, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid != pg_backend_pid() AND backend_type = 'client backend'"
            )
        for store in (a, b):
            with pytest.raises(UnavailableError):
                await store.get("video_000")
            assert (await store.get("video_000")).id == "video_000"
        assert await a.lost(["video_000"]) == []
        await a.insert(row(1))
        monkeypatch.setattr("sgl_diffusion.orchestrator.postgres._LOCK_SECONDS", 0.0)
        with pytest.raises(SetupError, match="running as node 'a'"):  # its lock is held again
            await JobStore.open(tmp_path / "c", shared, "a")

    story(tmp_path, shared, scenario)


def test_rows_that_nobody_works_on_are_taken_up_again(tmp_path: Path, shared: str) -> None:
    """Their end could not be stored while the database was away."""

    async def scenario(a: JobStore, b: JobStore) -> None:
        for number in range(3):
            await a.insert(row(number, status="in_progress"))
        (again,) = await a.claim(LIKE, 0, ["video_000", "video_002"])
        assert again.id == "video_001" and again.status == "queued" and again.interruptions == 1
        assert await b.claim(LIKE, 9, []) == [again], "it waits again, and may go elsewhere"

    story(tmp_path, shared, scenario)


def test_the_same_request_to_both_is_one_job(tmp_path: Path, shared: str) -> None:
    async def scenario(a: JobStore, b: JobStore) -> None:
        asked = [
            store.insert(row(number, idempotency_key="k", body_hash="h"))
            for number, store in enumerate((a, b) * 10)
        ]
        stored = await asyncio.gather(*asked)
        assert len({found.id for found in stored}) == 1
        assert len(await a.list("video")) == 1

    story(tmp_path, shared, scenario)


@pytest.mark.parametrize("url", ["postgresql:///x?host=/nowhere", "postgresql://127.0.0.1:1/x"])
def test_a_database_that_is_not_there(tmp_path: Path, url: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(SetupError, match="job database cannot be used"):
        asyncio.run(JobStore.open(tmp_path, url, "a"))


def test_a_newer_schema_is_refused(tmp_path: Path, shared: str) -> None:
    import psycopg

    async def scenario(a: JobStore, b: JobStore) -> None:
        with psycopg.connect(shared, autocommit=True) as other:
            other.execute("UPDATE schema_version SET version = 99")
        with pytest.raises(SetupError, match="newer version"):
            await JobStore.open(tmp_path / "c", shared, "c")

    story(tmp_path, shared, scenario)


def test_the_doctor_reaches_the_database(shared: str) -> None:
    from sgl_diffusion.cli.checks import storage

    check = storage.database(shared)
    assert check.status == "ok" and check.found.endswith(", database postgres")
