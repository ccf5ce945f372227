"""Deaths, hangs and restarts of a worker process under a living coordinator."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from sgl_diffusion.base.errors import EngineError, UnavailableError, WorkerLostError
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.job import JobHandle
from sgl_diffusion.orchestrator.supervise import Supervisor
from tests.orchestrator.play import HASTY, QUICK, alive, children, play, until

LONG = {"steps": 60, "sleep": 0.02, "arrays": [["uint8", [4], 9]]}


def restarts(coordinator: Coordinator) -> dict[str, float]:
    return {
        m.labels["reason"]: m.value
        for m in coordinator.metrics()
        if m.name == "worker_restarts_total"
    }


async def kill_in_the_middle(coordinator: Coordinator, job: JobHandle) -> int:
    """Kill the worker after it did a few steps of the job; returns its process id."""
    health = coordinator.health()
    await until(lambda: job.snapshot().step >= 3)
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: coordinator.health().restarts > health.restarts)
    return pid


def test_a_job_whose_worker_is_killed_runs_once_more_and_ends() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        card = coordinator.card()
        job = await coordinator.submit(LONG)
        kinds: list[str] = []

        async def follow() -> None:
            kinds.extend([event.kind async for event in job.events()])

        following = asyncio.create_task(follow())
        killed = await kill_in_the_middle(coordinator, job)
        assert job.snapshot().attempt == 2
        assert job.snapshot().progress == 0
        assert coordinator.card() == card  # known across restarts
        output = await asyncio.wait_for(job.result(), 50)
        assert output.arrays[0].tolist() == [9] * 4
        assert output.meta["pid"] != killed
        assert not alive(killed)
        await following
        assert "attempt" in kinds and kinds[-1] == "done"
        assert coordinator.health().ready
        assert restarts(coordinator) == {"signal": 1}

    # It was ready long enough, so the first restart does not wait.
    play(scenario, limits=dataclasses.replace(QUICK, backoff_first=60.0))


def test_a_second_death_fails_the_job_and_serves_the_next() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit(LONG)
        for _ in range(2):
            await kill_in_the_middle(coordinator, job)
        with pytest.raises(WorkerLostError, match="SIGKILL") as caught:
            await job.result()
        assert caught.value.code == "worker_lost"
        await (await coordinator.submit({"steps": 2})).result()

    play(scenario)


def test_a_job_that_kills_every_worker_does_not_take_waiting_ones_along() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        poison = await coordinator.submit({"steps": 9, "at": 2, "crash": True})
        waiting = await coordinator.submit({"steps": 3, "shy": True})
        with pytest.raises(WorkerLostError):
            await poison.result()
        await waiting.result()
        assert waiting.snapshot().attempt == 1
        assert restarts(coordinator) == {"signal": 2}

    play(scenario)


def test_the_companions_of_a_poison_job_are_not_given_up() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        early = [await coordinator.submit({"steps": 8, "sleep": 0.01}) for _ in range(3)]
        poison = await coordinator.submit({"steps": 9, "at": 3, "crash": True})
        late = [await coordinator.submit({"steps": 8, "sleep": 0.01}) for _ in range(3)]
        await until(lambda: coordinator.health().restarts == 1)
        newcomer = await coordinator.submit({"steps": 2})
        with pytest.raises(WorkerLostError):
            await poison.result()
        for job in (*early, *late, newcomer):
            await job.result()
        assert {job.snapshot().attempt for job in (*early, *late)} == {2}
        assert (poison.snapshot().attempt, newcomer.snapshot().attempt) == (2, 1)
        assert restarts(coordinator) == {"signal": 2}
        # Suspects ran one at a time, and the newcomer after them.
        seen = (await coordinator.control("look", {}))["seen"]
        assert seen == [job.id for job in (*late, newcomer)]

    play(scenario)


def test_a_suspect_that_is_cancelled_makes_room_for_the_next() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        jobs = [await coordinator.submit(LONG) for _ in range(3)]
        await until(lambda: all(job.snapshot().step >= 1 for job in jobs))
        await kill_in_the_middle(coordinator, jobs[0])
        await until(lambda: jobs[0].snapshot().step >= 1)
        assert [job.snapshot().state for job in jobs[1:]] == ["queued", "queued"]
        jobs[0].cancel()
        jobs[1].cancel()
        await jobs[2].result()

    play(scenario)


def test_a_death_under_an_earlier_server_counts() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        poison = await coordinator.submit({"steps": 9, "at": 2, "crash": True}, attempt=2)
        with pytest.raises(WorkerLostError):
            await poison.result()
        assert restarts(coordinator) == {"signal": 1}

    play(scenario)


def test_a_death_before_any_progress_is_charged_to_those_who_were_there() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        poison = await coordinator.submit({"at": 0, "crash": True})
        with pytest.raises(WorkerLostError):
            await poison.result()

    play(scenario)


def test_a_cancelled_job_is_not_run_again() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit(LONG)
        other = await coordinator.submit(LONG)
        await until(lambda: job.snapshot().step >= 2)
        job.cancel()
        await kill_in_the_middle(coordinator, other)
        await other.result()
        assert (await coordinator.control("look", {}))["seen"] == [other.id]

    play(scenario)


def test_a_control_action_dies_with_the_worker() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        waiting = asyncio.create_task(coordinator.control("wait", {"seconds": 60}))
        await asyncio.sleep(0.1)
        os.kill(children()[0], signal.SIGKILL)
        with pytest.raises(UnavailableError, match="SIGKILL"):
            await waiting

    play(scenario)


def test_a_worker_that_breaks_the_protocol_is_replaced() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit(LONG)
        await until(lambda: job.snapshot().step >= 2)
        with pytest.raises(UnavailableError, match="broke the protocol"):
            await coordinator.control("garbage", {})
        await job.result()
        assert restarts(coordinator) == {"protocol": 1}

    play(scenario)


def test_a_stopped_worker_is_found_by_its_silence() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit(LONG)
        await until(lambda: job.snapshot().step >= 2)
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: job.snapshot().attempt == 2)
        await job.result()
        assert not alive(pid)
        assert restarts(coordinator) == {"silent": 1}

    play(scenario, limits=HASTY)


def test_an_idle_and_a_slow_worker_are_left_alone() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await asyncio.sleep(2 * limits.silence)
        job = await coordinator.submit({"steps": 5, "sleep": 0.6})
        await job.result()
        assert coordinator.health().restarts == 0

    limits = dataclasses.replace(QUICK, silence=2.0)
    play(scenario, limits=limits)


def test_a_server_that_stood_still_does_not_blame_the_worker() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await (await coordinator.submit({})).result()
        time.sleep(3 * HASTY.silence)
        await asyncio.sleep(0.5)
        assert coordinator.health().restarts == 0

    play(scenario, limits=HASTY)


def test_a_worker_that_can_go_on_no_more_is_replaced() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 9, "at": 2, "wrong": True, "broken": True})
        with pytest.raises(EngineError):
            await job.result()
        assert "exit" in restarts(coordinator)

    for transport in ("process", "thread"):
        play(scenario, transport)


def test_many_deaths_make_it_unhealthy_but_it_still_serves() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for count in range(1, 4):
            assert coordinator.health().ready
            os.kill(children()[0], signal.SIGKILL)
            await until(lambda count=count: coordinator.health().restarts == count)
            await until(lambda: bool(coordinator._replicas.ready()))
        assert coordinator.health().state == "failed"
        assert "died 3 times" in coordinator.health().reason
        await (await coordinator.submit({})).result()
        deaths = coordinator._replicas._supervisors[0]._deaths
        for number, moment in enumerate(deaths):
            deaths[number] = moment - 600.0  # ten minutes have passed
        assert coordinator.health().ready

    play(scenario, limits=dataclasses.replace(QUICK, deaths=3))


def test_pauses_between_starts_grow_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = tmp_path / "loads"
    pauses: list[float] = []
    pause = Supervisor._pause

    async def noted(self: Supervisor, seconds: float) -> None:
        pauses.append(seconds)
        await pause(self, seconds)

    monkeypatch.setattr(Supervisor, "_pause", noted)

    async def scenario(coordinator: Coordinator) -> None:
        await until(lambda: loads.exists() and len(loads.read_text().split()) == 6)
        assert coordinator.health().state == "failed"

    limits = dataclasses.replace(QUICK, backoff_first=0.1, backoff_most=0.4)
    config = {"refuse_while": "/", "log_loads": str(loads)}
    play(scenario, "thread", limits=limits, wait=False, **config)
    times = [float(line) for line in loads.read_text().split()]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert pauses[:5] == [0.1, 0.2, 0.4, 0.4, 0.4]
    assert all(gap >= wanted for gap, wanted in zip(gaps, pauses, strict=False))


def test_a_thread_that_hangs_is_left_behind(tmp_path: Path) -> None:
    end = tmp_path / "end"

    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 2, "at": 1, "stuck": str(end)})
        await until(lambda: job.snapshot().step == 1)
        await coordinator.stop()  # what hangs goes on until the file is there
        end.touch()

    play(scenario, "thread", limits=dataclasses.replace(QUICK, leave=0.1, term=0.1))


def test_a_stage_that_never_gets_ready_is_ended() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await until(lambda: coordinator.health().restarts >= 1)
        assert restarts(coordinator) == {"silent": 1}
        assert coordinator.health().state == "restarting"

    limits = dataclasses.replace(QUICK, load_silence=0.5, leave=0.1)
    play(scenario, limits=limits, wait=False, load_sleep=60)


def test_stop_ends_a_worker_that_does_not_listen() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)
        await coordinator.stop()
        assert not alive(pid)

    play(scenario, limits=dataclasses.replace(QUICK, leave=0.2))
