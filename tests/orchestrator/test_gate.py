"""Changes of a stage are barriers between the jobs before them and the jobs after them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sgl_diffusion.base.errors import (
    CancelledError,
    RequestError,
    UnavailableError,
)
from sgl_diffusion.orchestrator.coordinator import Coordinator
from tests.orchestrator.play import TRANSPORTS, play, until

LONG = {"steps": 8, "sleep": 0.05}


async def seen(coordinator: Coordinator) -> list[str]:
    return list((await coordinator.control("look", {}))["seen"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_jobs_and_changes_happen_in_the_order_they_came(transport: str) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        before = [await coordinator.submit(LONG, job_id=name) for name in ("a", "b")]
        change = asyncio.create_task(coordinator.change("first", {}, 30))
        await asyncio.sleep(0)
        between = await coordinator.submit({}, job_id="c")
        second = asyncio.create_task(coordinator.change("second", {}, 30))
        await asyncio.sleep(0)
        after = await coordinator.submit({}, job_id="d")
        state = coordinator.gate()
        assert (state.changing, state.changes, state.held, state.ahead) == (True, 2, 2, 2)
        held = {metric.name: metric.value for metric in coordinator.metrics()}
        assert (held["jobs_held"], held["changes_waiting"]) == (2, 2)
        assert await seen(coordinator) == ["a", "b"]

        first = await change
        assert first["running"] == 0 and first["seen"] == ["a", "b"]
        assert all(job.snapshot().state == "completed" for job in before)
        assert (await second)["seen"] == ["a", "b", "c"]
        assert between.snapshot().state == "completed"
        await after.result()
        assert await seen(coordinator) == ["a", "b", "c", "d"]
        assert not coordinator.gate().changing

    play(scenario, transport)


def test_a_change_of_an_idle_stage_is_made_at_once() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        assert (await coordinator.change("x", {"y": 1}, 30))["y"] == 1
        with pytest.raises(RequestError, match="Not like this"):
            await coordinator.change("refuse", {}, 30)
        await (await coordinator.submit({})).result()

    play(scenario)


def test_a_change_that_waits_too_long_gives_up_and_lets_the_jobs_go_on(tmp_path: Path) -> None:
    end = tmp_path / "end"

    async def scenario(coordinator: Coordinator) -> None:
        slow = await coordinator.submit({"steps": 20, "sleep": 0.01, "hold": str(end)})
        change = asyncio.create_task(coordinator.change("x", {}, 0.2))
        await asyncio.sleep(0)
        held = await coordinator.submit({}, job_id="held")
        with pytest.raises(UnavailableError) as caught:
            await change
        assert caught.value.code == "change_timeout"
        await held.result()
        assert slow.snapshot().state == "in_progress"
        end.touch()
        assert await slow.result()

    play(scenario)


def test_cancelling_works_on_both_sides_of_a_change() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        running = await coordinator.submit({"steps": 1000, "sleep": 0.02}, job_id="running")
        change = asyncio.create_task(coordinator.change("x", {}, 30))
        await asyncio.sleep(0)
        held = await coordinator.submit({}, job_id="held")
        late = await coordinator.submit({}, job_id="late", deadline=0.05)
        assert held.cancel()
        with pytest.raises(CancelledError):
            await held.result()
        with pytest.raises(Exception, match="not done within"):
            await late.result()
        await until(lambda: running.snapshot().state == "in_progress")
        assert running.cancel()
        assert (await change)["seen"] == ["running"]
        assert coordinator.gate().held == 0

    play(scenario)


def test_a_waiting_change_survives_the_worker_and_one_under_way_does_not() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        doomed = await coordinator.submit({"steps": 9, "sleep": 0.05, "at": 3, "crash": True})
        change = asyncio.create_task(coordinator.change("x", {}, 30))
        await asyncio.sleep(0)
        held = await coordinator.submit({}, job_id="held")
        # The job comes first again after the restart, and ends with the second death.
        with pytest.raises(Exception, match="last of 2 attempts"):
            await doomed.result()
        assert (await change)["seen"] == []
        await held.result()

        dying = asyncio.create_task(coordinator.change("garbage", {}, 30))
        await asyncio.sleep(0)
        behind = await coordinator.submit({})
        with pytest.raises(UnavailableError, match="before it answered"):
            await dying
        await behind.result()

    play(scenario)


def test_a_server_that_stops_ends_the_changes() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 1000, "sleep": 0.02})
        change = asyncio.create_task(coordinator.change("x", {}, 30))
        await asyncio.sleep(0)
        held = await coordinator.submit({})
        await coordinator.stop(0.1)
        for ended in (change, job.result(), held.result()):
            with pytest.raises(UnavailableError):
                await ended
        with pytest.raises(UnavailableError):
            await coordinator.change("x", {}, 30)

    play(scenario)
