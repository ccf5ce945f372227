"""Jobs through the coordinator and a real worker, over both transports."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import numpy as np
import pytest

from sgl_diffusion.base.errors import (
    BusyError,
    CancelledError,
    ConflictError,
    EngineError,
    RequestError,
    SetupError,
    UnavailableError,
)
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.job import Job
from tests.orchestrator.play import TRANSPORTS, descriptors, play, until

pytestmark = pytest.mark.parametrize("transport", TRANSPORTS)


def test_arrays_come_back_as_they_were(transport: str) -> None:
    wanted = [
        ("uint8", [81, 480, 832, 3], 7),  # 97 MB
        ("float32", [2, 0, 3], 0),
        ("float16", [], 1.5),
        ("int64", [5], -3),
    ]

    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 2, "arrays": wanted})
        output = await job.result()
        assert output.meta["seconds"] == {"work": 0.5}
        for values, (dtype, shape, fill) in zip(output.arrays, wanted, strict=True):
            assert (values.dtype, list(values.shape)) == (np.dtype(dtype), shape)
            assert (values == fill).all()
            assert not values.flags.writeable
        again = await job.result()
        assert again is output

        nothing = await (await coordinator.submit({"arrays": []})).result()
        assert nothing.arrays == []

    play(scenario, transport)


def test_events_tell_the_whole_story(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        # Of two progresses in a row the second may be told alone: a part comes between them.
        job = await coordinator.submit({"steps": 4, "sleep": 0.05, "parts": 3})
        assert job.snapshot().state == "queued"
        assert job.snapshot().queue_position == 0
        events = [event async for event in job.events()]
        kinds = [event.kind for event in events]
        assert kinds[0] == "queued" and kinds[-1] == "done"
        parts = [event.output.meta["part"] for event in events if event.kind == "output"]
        assert parts == [1, 2, 3]
        assert [e.output.arrays[0].tolist() for e in events if e.kind == "output"] == [
            [1, 1, 1],
            [2, 2, 2],
            [3, 3, 3],
        ]
        percents = [event.snapshot.progress for event in events]
        assert percents == sorted(percents) and percents[-1] == 100
        assert {25, 50, 75} <= set(percents)
        assert max(p for p in percents if p < 100) == 99
        assert events[-2].snapshot.phase == "work"
        late = [event.kind async for event in job.events()]
        assert late == ["done"]
        assert job.snapshot().state == "completed"

    play(scenario, transport)


def test_cancel_takes_effect_at_a_step_boundary(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 10_000, "sleep": 0.02})
        await until(lambda: job.snapshot().step >= 2)
        assert job.cancel()
        with pytest.raises(CancelledError):
            await job.result()
        assert job.snapshot().state == "failed"
        assert not job.cancel() and not coordinator.cancel("nobody")
        after = (await coordinator.control("look", {}))["steps"]
        assert after < 10_000
        await asyncio.sleep(0.1)
        later = await coordinator.control("look", {})
        assert later["steps"] == after and later["running"] == 0

    play(scenario, transport)


def test_deadline_ends_the_job_and_frees_the_worker(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 1000, "sleep": 0.02}, deadline=0.2)
        with pytest.raises(EngineError) as caught:
            await job.result()
        assert caught.value.code == "deadline_exceeded"
        assert (await coordinator.control("look", {}))["running"] == 0
        quick = await coordinator.submit({"steps": 1}, deadline=60.0)
        await quick.result()

    play(scenario, transport)


def test_a_full_queue_refuses_with_a_time_to_return(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await (await coordinator.submit({"steps": 2, "sleep": 0.05})).result()
        jobs = [await coordinator.submit({"steps": 4, "sleep": 0.02}) for _ in range(3)]
        with pytest.raises(BusyError) as caught:
            await coordinator.submit({})
        assert 1 <= caught.value.retry_after <= 110
        assert "3 jobs ahead" in caught.value.message
        with pytest.raises(BusyError):
            await coordinator.submit({}, job_id=jobs[0].id)
        for job in jobs:
            await job.result()
        await (await coordinator.submit({})).result()

    play(scenario, transport, max_jobs=3)


def test_ids_and_sizes_are_checked_before_admission(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 10**6, "sleep": 0.01}, job_id="mine")
        assert job.id == "mine"
        with pytest.raises(ConflictError):
            await coordinator.submit({}, job_id="mine")
        with pytest.raises(RequestError, match="64 MiB"):
            await coordinator.submit({"blob": b"x" * (65 << 20)})
        with pytest.raises(TypeError):
            await coordinator.submit({"odd": object()})
        big = await coordinator.submit({"blob": b"x" * (8 << 20)})
        await big.result()
        assert (await coordinator.control("look", {}))["running"] == 1

    play(scenario, transport)


def test_waiting_in_another_order_than_jobs_end_does_not_block(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        slow = await coordinator.submit({"steps": 60, "sleep": 0.001})
        quick = [
            await coordinator.submit({"arrays": [["uint8", [1000], n]]}) for n in range(40)
        ]  # more than there are credits
        await slow.result()
        for n, job in enumerate(quick):
            assert (await job.result()).arrays[0][0] == n

    play(scenario, transport)


def test_a_step_that_raises_fails_its_jobs_and_the_worker_goes_on(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        pid = coordinator.card()["pid"]
        job = await coordinator.submit({"steps": 5, "at": 2, "wrong": True})
        with pytest.raises(EngineError) as caught:
            await job.result()
        assert "secret" not in str(caught.value)
        assert "ValueError" in str(caught.value)
        after = await (await coordinator.submit({"steps": 2})).result()
        assert after.meta["pid"] == pid
        assert coordinator.health().restarts == 0

    play(scenario, transport)


def test_control_answers_refuses_and_hides_foreign_text(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        answer = await coordinator.control("look", {"x": [1, "two"]})
        assert answer["x"] == [1, "two"]
        with pytest.raises(RequestError) as refused:
            await coordinator.control("refuse", {})
        assert (refused.value.code, refused.value.param) == ("refused", "x")
        with pytest.raises(EngineError) as bug:
            await coordinator.control("bug", {})
        assert "secret" not in str(bug.value)

    play(scenario, transport)


def test_metrics_are_never_older_than_a_result(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for done in range(1, 4):
            await (await coordinator.submit({"steps": 7})).result()
            samples = {(m.name, *m.labels.values()): m.value for m in coordinator.metrics()}
            assert samples["steps_total",] == 7 * done
            assert samples["jobs_total", "completed"] == done
        assert samples["queue_wait_seconds_count", "other"] == 3
        assert samples["jobs_waiting",] == samples["jobs_running",] == 0
        assert samples["worker_ready",] == 1

    play(scenario, transport)


def test_jobs_of_before_ready_run_when_it_is(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        assert coordinator.health().state == "loading"
        assert coordinator.card() is None
        jobs = [await coordinator.submit({}) for _ in range(3)]
        assert [job.snapshot().queue_position for job in jobs] == [0, 1, 2]
        with pytest.raises(UnavailableError):
            await coordinator.control("look", {})
        for job in jobs:
            await job.result()
        seen = (await coordinator.control("look", {}))["seen"]
        assert seen == [job.id for job in jobs]

    play(scenario, transport, wait=False, load_sleep=0.2)


def test_drain_lets_running_jobs_end_and_fails_the_rest(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        short = await coordinator.submit({"steps": 10, "sleep": 0.02})
        long = await coordinator.submit({"steps": 10**9, "sleep": 0.0})
        await until(lambda: long.snapshot().state == "in_progress")
        stopping = asyncio.create_task(coordinator.stop(60.0))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            await coordinator.submit({})
        await short.result()
        assert not stopping.done()
        await coordinator.stop(0.0)  # the second one is in a hurry
        with pytest.raises(UnavailableError) as caught:
            await long.result()
        assert caught.value.code == "server_restarted"
        await stopping

    play(scenario, transport)


def test_a_stage_that_cannot_start_says_why_and_is_retried(transport: str, tmp_path: Path) -> None:
    marker = tmp_path / "bad"
    marker.touch()

    async def scenario(coordinator: Coordinator) -> None:
        waiting = await coordinator.submit({})
        with pytest.raises(SetupError, match="The weights are bad") as caught:
            await coordinator.ready()
        assert caught.value.code == "bad_weights"
        with pytest.raises(UnavailableError, match="The weights are bad"):
            await waiting.result()
        assert coordinator.health().state == "failed"
        assert "The weights are bad" in coordinator.health().reason
        with pytest.raises(UnavailableError, match="The weights are bad"):
            await coordinator.submit({})
        marker.unlink()
        await until(lambda: coordinator.health().ready)
        await (await coordinator.submit({})).result()

    play(scenario, transport, wait=False, refuse_while=str(marker))


def test_a_bug_in_load_does_not_leak_its_text(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        with pytest.raises(EngineError) as caught:
            await coordinator.ready()
        assert "secret" not in str(caught.value)

    play(scenario, transport, wait=False, load_bug=True)


def test_two_hundred_jobs_leave_nothing_behind(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await _mixed_jobs(coordinator, 20)
        await _settle()
        before, tasks = descriptors(), len(asyncio.all_tasks())
        for _ in range(2):
            await _mixed_jobs(coordinator, 100)
        await _settle()
        assert not descriptors() - before
        assert len(asyncio.all_tasks()) == tasks
        assert [thing for thing in gc.get_objects() if type(thing) is Job] == []

    play(scenario, transport)


async def _settle() -> None:
    """Let dropped readers close: each takes a collection and a turn of the loop."""
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0.01)


async def _mixed_jobs(coordinator: Coordinator, count: int) -> None:
    """Some are cancelled, some get a reader that goes away, half are dropped unread."""
    payload = {"steps": 2, "arrays": [["uint8", [100_000], 1]]}
    jobs = [await coordinator.submit(payload) for _ in range(count)]
    for job in jobs[::4]:
        job.cancel()
    for job in jobs[1::4]:
        await anext(job.events())
    kept = jobs[::2]
    del jobs
    await asyncio.gather(*(job.result() for job in kept), return_exceptions=True)
    await until(lambda: not coordinator._jobs)
