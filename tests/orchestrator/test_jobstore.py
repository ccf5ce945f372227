"""Durable rows: order, pages, locking, damage, and a process that is killed while it writes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sgl_diffusion.base.errors import ConflictError, NotFoundError, SetupError, UnavailableError
from sgl_diffusion.orchestrator import jobdb
from sgl_diffusion.orchestrator.jobstore import MAX_INTERRUPTIONS, JobRow, JobStore
from tests.orchestrator.play import descriptors

ROOT = Path(__file__).parents[2]


def with_store(
    folder: Path, scenario: Callable[[JobStore], Awaitable[None]], url: str | None = None
) -> None:
    async def story() -> None:
        store = await JobStore.open(folder, url, "here")
        try:
            await scenario(store)
        finally:
            await store.close()

    before = descriptors()
    asyncio.run(story())
    assert not descriptors() - before


def row(number: int, **fields: object) -> JobRow:
    made = JobRow(id=f"video_{number:03}", kind="video", payload={"seed": number})
    return dataclasses.replace(made, created_at=1000.0 + number // 2, **fields)


def test_a_row_comes_back_as_it_was(tmp_path: Path, url: str | None) -> None:
    async def scenario(store: JobStore) -> None:
        wanted = JobRow(id="a", kind="video", payload={"prompt": "кот 🐈", "sizes": [1, 2.5, None]})
        await store.insert(wanted)
        assert await store.get("a") == wanted
        with pytest.raises(Exception) as caught:
            await store.insert(wanted)
        assert isinstance(caught.value, store._refusals)
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
def test_pages_are_complete_even_when_stamps_are_equal(
    tmp_path: Path, url: str | None, order: str
) -> None:
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

    with_store(tmp_path, scenario, url)


def test_rows_in_progress_go_back_to_the_queue_in_order(tmp_path: Path, url: str | None) -> None:
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

    with_store(tmp_path, before, url)
    with_store(tmp_path, after, url)


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
def test_a_damaged_database_is_put_aside_and_rebuilt(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def fill(store: JobStore) -> None:
        for number in range(200):
            await store.insert(row(number, payload={"text": "x" * 500}))

        await store.update("video_005", status="completed", files=[{"name": "x"}])
        await store.update("video_006", status="in_progress", attempts=1)
        await store.delete("video_007")
        kept.extend(reversed(await store.list("video", limit=300)))

    async def rebuilt(store: JobStore) -> None:
        assert await store.list("video", limit=300, order="asc") == kept
        assert [event["kind"] for event in await store.events("video_005")] == ["rebuilt"]
        await store.insert(row(500))

    kept: list[JobRow] = []
    with_store(tmp_path, fill)
    path = tmp_path / "jobs.db"
    content = bytearray(path.read_bytes())
    path.write_bytes(damage or content[:8192] + os.urandom(16384) + content[24576:])
    (tmp_path / "jobs" / "video_008.json").write_text("{")
    kept = [found for found in kept if found.id != "video_008"]
    with_store(tmp_path, rebuilt)
    (aside,) = tmp_path.glob("jobs.db.corrupt-*")
    assert aside.stat().st_size > 0
    assert "video_008.json cannot be read" in caplog.text


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
        pages = "PRAGMA max_page_count = 12"
        await store._run(lambda: store._table._db.execute(pages).fetchone())
        with pytest.raises(UnavailableError) as caught:
            await store.insert(row(2, payload={"text": "x" * 100_000}))
        assert caught.value.code == "insufficient_storage"
        assert [found.id for found in await store.list("video")] == ["video_001"]

    with_store(tmp_path, scenario)


def test_the_same_request_is_one_job(tmp_path: Path, url: str | None) -> None:
    async def scenario(store: JobStore) -> None:
        first = row(1, idempotency_key="k", body_hash="h", owner="a")
        assert await store.insert(first) == first
        again = dataclasses.replace(first, id="video_100", created_at=1000.0 + 3600)
        assert (await store.insert(again)).id == first.id
        with pytest.raises(ConflictError) as caught:
            await store.insert(dataclasses.replace(again, body_hash="other"))
        assert caught.value.code == "idempotency_key_reused"
        stranger = dataclasses.replace(again, id="video_101", owner="b")
        assert (await store.insert(stranger)).id == "video_101"
        tomorrow = dataclasses.replace(first, id="video_102", created_at=1000.0 + 25 * 3600)
        assert (await store.insert(tomorrow)).id == "video_102"

    with_store(tmp_path, scenario, url)


def test_a_retry_finds_its_job_for_ten_minutes(tmp_path: Path, url: str | None) -> None:
    async def scenario(store: JobStore) -> None:
        first = row(1, body_hash="h")
        await store.insert(first)
        again = dataclasses.replace(first, id="video_100", created_at=first.created_at + 500)
        assert (await store.insert(again, retried=True)).id == first.id
        assert (await store.insert(again)).id == "video_100"  # asked twice on purpose
        late = dataclasses.replace(first, id="video_101", created_at=again.created_at + 700)
        assert (await store.insert(late, retried=True)).id == "video_101"

    with_store(tmp_path, scenario, url)


def test_the_history_of_a_job_is_only_added_to(tmp_path: Path, url: str | None) -> None:
    async def scenario(store: JobStore) -> None:
        await store.insert(row(1, owner="a"))
        await store.update("video_001", status="in_progress", attempts=1)
        await store.update("video_001", progress=40)
        error = {"code": "worker_lost", "message": "gone"}
        await store.update("video_001", status="failed", error=error, why={"worker": 7})
        with pytest.raises(ConflictError):
            await store.update("video_001", status="queued")
        with pytest.raises(ConflictError):
            await store.update("video_001", status="completed")
        assert not await store.expired("video_001")
        assert await store.expire("video_001", "age") and not await store.expire("video_001", "age")
        assert await store.expired("video_001") and await store.expired("video_001", "a")
        assert not await store.expired("video_001", "b")
        kinds = [event["kind"] for event in await store.events("video_001")]
        assert kinds == ["created", "in_progress", "failed", "expired"]
        assert (await store.events("video_001"))[2]["code"] == "worker_lost"
        with pytest.raises(Exception, match="never changed") as caught:
            change = "UPDATE events SET kind = 'x'"
            await store._run(lambda: store._table._db.execute(change))
        assert isinstance(caught.value, store._refusals)
        await store.prune()
        assert await store.expired("video_001")

    with_store(tmp_path, scenario, url)


def test_what_was_expired_is_forgotten_after_a_day(
    tmp_path: Path, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(store: JobStore) -> None:
        for number in (1, 2):
            await store.insert(row(number))
        await store.expire("video_001", "age")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
        assert not await store.expired("video_001")
        await store.prune()
        assert await store.events("video_001") == []
        assert len(await store.events("video_002")) == 1

    with_store(tmp_path, scenario, url)


def test_all_files_are_private(tmp_path: Path) -> None:
    async def scenario(store: JobStore) -> None:
        await store.insert(row(1))
        for path in (folder, *folder.rglob("*")):
            wanted = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path

    folder = tmp_path / "data"
    before = os.umask(0)
    try:
        with_store(folder, scenario)
    finally:
        os.umask(before)


def test_a_network_file_system_gets_a_rollback_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(store: JobStore) -> None:
        await store.insert(row(1))
        (mode,) = await store._run(
            lambda: store._table._db.execute("PRAGMA journal_mode").fetchone()
        )
        modes.append(mode)

    modes: list[str] = []
    with_store(tmp_path, scenario_empty)
    monkeypatch.setattr(jobdb, "filesystem_of", lambda path: "nfs4")
    with_store(tmp_path, scenario)
    assert modes == ["delete"] and "network file system (nfs4)" in caplog.text


async def scenario_empty(store: JobStore) -> None:
    assert await store.list("video") == []


def test_the_kernel_names_the_file_system() -> None:
    assert jobdb.filesystem_of(Path("/proc")) == "proc"


def test_a_database_of_the_first_version_is_migrated(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    db.executescript(f"BEGIN; {jobdb._MIGRATIONS[0]} PRAGMA user_version = 1; COMMIT;")
    db.execute(
        "INSERT INTO jobs VALUES"
        " ('a', 'video', 'in_progress', '{}', 5, 1, 0, 1.0, NULL, NULL, '[]')"
    )
    db.close()

    async def scenario(store: JobStore) -> None:
        (found,) = await store.recover()
        assert (found.id, found.attempts, found.interruptions) == ("a", 1, 1)
        assert (found.model, found.seeds, found.idempotency_key) == ("", [], None)

    with_store(tmp_path, scenario)


def test_a_row_whose_sidecar_cannot_be_written_is_not_stored(tmp_path: Path) -> None:
    async def scenario(store: JobStore) -> None:
        shutil.rmtree(tmp_path / "jobs")
        with pytest.raises(UnavailableError):
            await store.insert(row(1))
        assert await store.list("video") == []

    with_store(tmp_path, scenario)
