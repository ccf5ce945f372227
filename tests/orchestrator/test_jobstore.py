"""Durable rows: order, pages, locking, damage, and a process that is killed while it writes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sgl_diffusion.base.errors import NotFoundError, SetupError, UnavailableError
from sgl_diffusion.orchestrator.jobstore import MAX_INTERRUPTIONS, JobRow, JobStore
from tests.orchestrator.play import descriptors

ROOT = Path(__file__).parents[2]


def with_store(folder: Path, scenario: Callable[[JobStore], Awaitable[None]]) -> None:
    async def story() -> None:
        store = await JobStore.open(folder)
        try:
            await scenario(store)
        finally:
            await store.close()

    before = descriptors()
    asyncio.run(story())
    assert descriptors() == before


def row(number: int, **fields: object) -> JobRow:
    made = JobRow(id=f"video_{number:03}", kind="video", payload={"seed": number})
    return dataclasses.replace(made, created_at=1000.0 + number // 2, **fields)


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    async def scenario(store: JobStore) -> None:
        wanted = JobRow(id="a", kind="video", payload={"prompt": "кот 🐈", "sizes": [1, 2.5, None]})
        await store.insert(wanted)
        assert await store.get("a") == wanted
        with pytest.raises(sqlite3.IntegrityError):
            await store.insert(wanted)
        error = {"code": "worker_lost", "message": "gone"}
        await store.update("a", status="failed", error=error, completed_at=5.0, attempts=2)
        changed = await store.get("a")
        assert changed == dataclasses.replace(
            wanted, status="failed", error=error, completed_at=5.0, attempts=2
        )
        await store.update("a", files=[{"name": "a.mp4", "bytes": 5}], error=None)
        assert (await store.get("a")).files == [{"name": "a.mp4", "bytes": 5}]
        assert (await store.get("a")).error is None
        assert await store.get("b") is None
        with pytest.raises(NotFoundError):
            await store.update("b", progress=5)
        assert await store.delete("a") and not await store.delete("a")

    with_store(tmp_path / "new" / "folder", scenario)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_are_complete_even_when_stamps_are_equal(tmp_path: Path, order: str) -> None:
    async def scenario(store: JobStore) -> None:
        for number in (3, 1, 4, 0, 6, 2, 5):
            await store.insert(row(number))
        await store.insert(dataclasses.replace(row(9), kind="other"))
        pages, after = [], None
        while page := await store.list("video", after=after, limit=2, order=order):
            pages += [found.id for found in page]
            after = page[-1].id
        assert pages == sorted(pages, reverse=order == "desc")
        assert len(pages) == 7
        with pytest.raises(NotFoundError) as caught:
            await store.list("video", after="nobody")
        assert caught.value.param == "after"
        await store.update("video_004", status="completed")
        assert [r.id for r in await store.list("video", status="completed")] == ["video_004"]

    with_store(tmp_path, scenario)


def test_rows_in_progress_go_back_to_the_queue_in_order(tmp_path: Path) -> None:
    async def before(store: JobStore) -> None:
        statuses = ("in_progress", "queued", "completed", "in_progress", "failed", "queued")
        for number, status in reversed(list(enumerate(statuses))):
            await store.insert(row(number, status=status, progress=50))
        tired = row(6, status="in_progress", interruptions=MAX_INTERRUPTIONS)
        await store.insert(tired)

    async def after(store: JobStore) -> None:
        queued = await store.recover()
        assert [(r.id[-1], r.interruptions) for r in queued] == [
            ("0", 1),
            ("1", 0),
            ("3", 1),
            ("5", 0),
        ]
        assert queued[0].progress == 0 and queued[0].payload == {"seed": 0}
        assert {r.status for r in queued} == {"queued"}
        tired = await store.get("video_006")
        assert tired.status == "failed" and tired.error["code"] == "server_restarted"
        assert [r.id for r in await store.recover()] == [r.id for r in queued]

    with_store(tmp_path, before)
    with_store(tmp_path, after)


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    code = """
        import asyncio, sys
        from pathlib import Path
        from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore

        async def main():
            store = await JobStore.open(Path(sys.argv[1]))
            for number in range(100000):
                name = f"job{number:06}"
                await store.insert(JobRow(id=name, kind="video", payload={}))
                await store.update(name, status="in_progress")
                print(name, flush=True)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        told = [server.stdout.readline().strip() for _ in range(20)]
        server.kill()
        told += server.stdout.read().split("\n")[:-1]

    async def scenario(store: JobStore) -> None:
        queued = [found.id for found in await store.recover()]
        assert queued[: len(told)] == told
        assert len(queued) <= len(told) + 1

    with_store(tmp_path, scenario)


def test_a_second_server_is_told_who_has_the_folder(tmp_path: Path) -> None:
    async def scenario(store: JobStore) -> None:
        with pytest.raises(SetupError, match=f"used by process {os.getpid()}"):
            await JobStore.open(tmp_path)
        await store.insert(row(1))

    with_store(tmp_path, scenario)
    with_store(tmp_path, scenario_nothing)


async def scenario_nothing(store: JobStore) -> None:
    assert len(await store.list("video")) == 1


@pytest.mark.parametrize("damage", [b"this is no database, and a long one " * 300, None])
def test_a_damaged_database_is_put_aside(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def fill(store: JobStore) -> None:
        for number in range(200):
            await store.insert(row(number, payload={"text": "x" * 500}))

    async def empty(store: JobStore) -> None:
        assert await store.list("video") == []
        await store.insert(row(1))

    with_store(tmp_path, fill)
    path = tmp_path / "jobs.db"
    content = bytearray(path.read_bytes())
    path.write_bytes(damage or content[:8192] + os.urandom(16384) + content[24576:])
    with_store(tmp_path, empty)
    (kept,) = tmp_path.glob("jobs.db.corrupt-*")
    assert kept.stat().st_size > 0


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with_store(tmp_path, scenario_write)
    db = sqlite3.connect(tmp_path / "jobs.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(SetupError, match="newer version"):
        with_store(tmp_path, scenario_write)


async def scenario_write(store: JobStore) -> None:
    await store.insert(row(1))


def test_a_folder_that_cannot_be_used_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="file/inside"):
        asyncio.run(JobStore.open(tmp_path / "file" / "inside"))


def test_a_full_disk_is_an_error_of_the_server_and_not_of_the_database(tmp_path: Path) -> None:
    async def scenario(store: JobStore) -> None:
        await store.insert(row(1))
        pages = "PRAGMA max_page_count = 8"
        await store._run(lambda: store._db.execute(pages).fetchone())
        with pytest.raises(UnavailableError) as caught:
            await store.insert(row(2, payload={"text": "x" * 100_000}))
        assert caught.value.code == "insufficient_storage"
        assert [found.id for found in await store.list("video")] == ["video_001"]

    with_store(tmp_path, scenario)
