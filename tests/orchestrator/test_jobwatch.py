"""The job table's rows in memory, and those who watch it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sgl_diffusion.orchestrator.jobstore import JobStore
from tests.orchestrator.test_jobstore import row, with_store


def test_rows_in_memory_are_those_of_the_table(tmp_path: Path) -> None:
    """After every kind of change, also one whose caller gave up waiting."""

    async def scenario(store: JobStore) -> None:
        async def same() -> None:
            for number in range(400):
                job_id = f"video_{number:03}"
                stored = await store._run(lambda job_id=job_id: store._table.get(job_id))
                assert await store.get(job_id) == stored

        for number in range(400):  # more than are kept
            await store.insert(row(number))
        await same()
        assert len(store._known.rows) < 400
        for number in range(0, 400, 7):
            await store.update(f"video_{number:03}", status="in_progress", progress=number)
        await store.delete("video_007")
        await store.expire("video_014", "age")
        await same()
        for number in range(21, 41):
            given_up = asyncio.ensure_future(store.update(f"video_{number:03}", status="failed"))
            await asyncio.sleep(0.0005 * (number % 4))  # before, within or after the work
            given_up.cancel()
        await same()
        await store.recover()
        await same()

    with_store(tmp_path, scenario)


def test_watchers_hear_of_every_change(tmp_path: Path, url: str | None) -> None:
    async def scenario(store: JobStore) -> None:
        heard: list[tuple[str, str | None]] = []
        store.watch(lambda job_id, row: heard.append((job_id, row and row.status)))
        await store.insert(row(1))
        await store.update("video_001", status="completed")
        await store.insert(row(2))
        await store.expire("video_001", "age")
        await store.delete("video_002")
        assert heard == [
            ("video_001", "queued"), ("video_001", "completed"), ("video_002", "queued"),
            ("video_001", None), ("video_002", None),
        ]  # fmt: skip

    with_store(tmp_path, scenario, url)
