"""Replicas of a stage: who gets which job, what becomes of the jobs of one that dies, changes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.job import Job
from sgl_diffusion.orchestrator.replicas import assign
from tests.orchestrator.play import children, play, until

LONG = {"steps": 20, "sleep": 0.05}


async def both_ready(coordinator: Coordinator) -> list[int]:
    await until(lambda: len(coordinator._replicas.ready()) == 2)
    answers = await coordinator.control_all("look", {})
    assert len(answers) == 2
    return children()


async def where(*jobs: Any) -> list[int]:
    """The processes that the jobs ended in."""
    return [(await job.result()).meta["pid"] for job in jobs]


def test_jobs_are_shared_by_work() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        pids = await both_ready(coordinator)
        even = [await coordinator.submit(LONG) for _ in range(4)]
        assert Counter(await where(*even)) == dict.fromkeys(pids, 2)
        heavy = await coordinator.submit(LONG, weight=10.0)
        light = [await coordinator.submit(LONG, weight=1.0) for _ in range(3)]
        (there,) = await where(heavy)
        assert set(await where(*light)) == set(pids) - {there}
        seen = [set(answer["seen"]) for answer in await coordinator.control_all("look", {})]
        assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 8

    play(scenario, replicas=2)


def test_the_jobs_of_a_dead_replica_go_to_the_others(tmp_path: Path) -> None:
    places, end = tmp_path / "places", tmp_path / "end"
    places.mkdir()
    for name in "ab":
        (places / name).touch()

    async def scenario(coordinator: Coordinator) -> None:
        pids = await both_ready(coordinator)
        jobs = [await coordinator.submit({**LONG, "hold": str(end)}) for _ in range(2)]
        await until(lambda: all(job.snapshot().step > 2 for job in jobs))
        victim = pids[0]
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(coordinator._replicas.ready()) == 1)
        assert coordinator.health().ready and "1 of 2 replicas" in coordinator.health().reason
        later = await coordinator.submit({})
        end.touch()
        assert set(await where(later, *jobs)) == set(pids) - {victim}
        assert sorted(job.snapshot().attempt for job in jobs) == [1, 2]
        (places / "c").touch()
        await until(lambda: len(coordinator._replicas.ready()) == 2)
        assert coordinator.health().reason == "" and coordinator.health().restarts == 1
        assert len(set(children()) - set(pids)) == 1

    play(scenario, replicas=2, places=str(places))


def test_one_replica_that_cannot_start_leaves_the_work_to_the_others() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await until(lambda: "This one cannot." in coordinator.health().reason)
        assert coordinator.health().ready
        await asyncio.gather(*[(await coordinator.submit({})).result() for _ in range(4)])

    play(scenario, replicas=2, bad_replica=1)


def test_a_change_is_made_in_all_replicas() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        pids = await both_ready(coordinator)
        jobs = [await coordinator.submit(LONG) for _ in range(2)]
        assert (await coordinator.change("x", {"y": 1}, 30))["y"] == 1
        assert all(job.snapshot().state == "completed" for job in jobs)
        with pytest.raises(RequestError, match="Not like this"):
            await coordinator.change("refuse", {"everywhere": True}, 30)
        assert children() == pids

    play(scenario, replicas=2)


def test_a_replica_that_cannot_follow_a_change_is_started_again() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        pids = await both_ready(coordinator)
        with pytest.raises(RequestError, match="Not like this"):
            await coordinator.control_all("refuse", {"replica": 1})
        assert coordinator.health().restarts == 0
        answer = await coordinator.change("refuse", {"replica": 1}, 30)
        assert answer["replica"] == 1
        await until(lambda: coordinator.health().restarts == 1)
        await until(lambda: len(coordinator._replicas.ready()) == 2)
        assert len(set(children()) & set(pids)) == 1
        reasons = {m.labels["reason"] for m in coordinator.metrics() if "restarts" in m.name}
        assert reasons == {"change"}

    play(scenario, replicas=2)


def test_an_action_for_whoever_can() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await both_ready(coordinator)
        answers = await coordinator.control_any("look", {"x": 1})
        assert {name: answer["x"] for name, answer in answers.items()} == {"work-0": 1, "work-1": 1}
        assert list(await coordinator.control_any("refuse", {"replica": 0})) == ["work-1"]
        with pytest.raises(RequestError, match="Not like this"):
            await coordinator.control_any("refuse", {"everywhere": True})

    play(scenario, replicas=2)


def test_the_samples_say_whose_they_are() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await both_ready(coordinator)
        await asyncio.gather(*[(await coordinator.submit(LONG)).result() for _ in range(2)])

        def steps() -> dict[str, float]:
            named = [m for m in coordinator.metrics() if m.name == "steps_total"]
            return {m.labels["replica"]: m.value for m in named}

        await until(lambda: set(steps()) == {"0", "1"} and min(steps().values()) >= 20)

    play(scenario, replicas=2)


class _Place:
    """Stands for a replica: `assign` compares them and no more."""


def _job(name: str, **state: Any) -> Job:
    return Job(name, {}, 0.0, lambda job: 0, **state)


def assigned(jobs: list[Job], places: list[Any]) -> dict[str, int]:
    return {job.id: places.index(place) for job, place in assign(jobs, places)}


def test_a_suspect_waits_for_an_empty_replica_and_the_others_do_not_wait() -> None:
    a, b = places = [_Place(), _Place()]
    jobs = [
        _job("on a", replica=a),
        _job("also on a", replica=a),
        _job("on b", replica=b),
        _job("first", suspect=True),
        _job("second", suspect=True),
        _job("new"),
    ]
    assert assigned(jobs, places) == {"new": 0}  # b has fewer: it is to become empty
    jobs = [job for job in jobs if job.id != "on b"]
    assert assigned(jobs, places) == {"first": 1, "new": 0}
    jobs[2].replica = b
    assert assigned(jobs, places) == {"new": 0}  # one suspect at a time
    assert assigned(jobs, [b]) == {}  # with the only replica taken, all wait
    assert assigned(jobs, []) == {}


def test_what_is_done_of_a_job_is_no_work_any_more() -> None:
    a, b = places = [_Place(), _Place()]
    jobs = [
        _job("nearly done", replica=a, weight=10.0, percent=95),
        _job("just begun", replica=b, weight=1.0),
        _job("new"),
    ]
    assert assigned(jobs, places) == {"new": 0}
