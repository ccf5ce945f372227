"""Jobs through two stages, each in a process (or a thread) of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.base.errors import (
    CancelledError,
    SetupError,
    UnavailableError,
    WorkerLostError,
)
from sgl_diffusion.orchestrator.graph import Graph
from sgl_diffusion.orchestrator.job import JobHandle
from sgl_diffusion.orchestrator.topology import App, StageSpec
from tests.orchestrator.chain_worker import FIRST, SECOND
from tests.orchestrator.play import QUICK, TRANSPORTS, children, until

MODULE = "tests.orchestrator.chain_worker"
both = pytest.mark.parametrize("transport", TRANSPORTS)


def play(
    scenario: Callable[[Graph], Awaitable[None]],
    transport: str = "process",
    *,
    limits: Any = QUICK,
    wait: bool = True,
    second: dict[str, Any] | None = None,
) -> None:
    """Start, run the scenario, stop; no child and no task may remain."""
    stages = (
        StageSpec(name=FIRST, entry=f"{MODULE}:make_first"),
        StageSpec(name=SECOND, entry=f"{MODULE}:make_second", config=second or {}),
    )

    async def story() -> None:
        app = App(name="chain", stages=stages)
        graph = Graph(app, transport=TRANSPORTS[transport](), limits=limits)
        await graph.start()
        try:
            if wait:
                await graph.ready()
            await scenario(graph)
        finally:
            await graph.stop()
        assert graph.health().state == "stopped"
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(story())
    assert children() == []


def inside(graph: Graph) -> dict[str, float]:
    found = (m for m in graph.metrics() if m.name == "inside")
    return {m.labels["stage"]: m.value for m in found}


def pid_of(graph: Graph, stage: str) -> int:
    card = graph.card()
    assert card is not None
    return int(card[stage])


async def follow(job: JobHandle, parts: list[dict[str, Any]]) -> None:
    async for event in job.events():
        if event.kind == "output" and event.output is not None:
            parts.append(event.output.meta)


@both
@pytest.mark.parametrize("size", [1, 100_000], ids=["inside", "shared memory"])
def test_pieces_flow_while_the_first_stage_still_works(
    tmp_path: Path, transport: str, size: int
) -> None:
    end = tmp_path / "end"

    async def scenario(graph: Graph) -> None:
        payload = {"sleep": 0.002, "size": size, "hold": str(end)}
        jobs = [await graph.submit({**payload, "steps": steps}) for steps in (4, 9)]
        told: list[list[dict[str, Any]]] = [[] for _ in jobs]
        telling = [asyncio.create_task(follow(*each)) for each in zip(jobs, told, strict=True)]
        await until(lambda: all(any("doubled" in p for p in parts) for parts in told), 60)
        end.touch()
        await asyncio.gather(*telling)
        for job, parts, steps in zip(jobs, told, (4, 9), strict=True):
            output = await job.result()
            total = steps * (steps + 1)
            assert output.meta == {"counted": steps, "sum": total}
            assert output.arrays[0].tolist() == [total]
            assert [p["said"] for p in parts if "said" in p] == list(range(1, steps + 1))
            assert [p["doubled"] for p in parts if "doubled" in p] == [
                2 * step for step in range(1, steps + 1)
            ]
            first = next(i for i, p in enumerate(parts) if "doubled" in p)
            assert first < max(i for i, p in enumerate(parts) if "said" in p)
        alone = await graph.submit({"steps": 2, "alone": True})
        assert (await alone.result()).meta == {"counted": 2}
        assert graph._runs == {}

    play(scenario, transport)


@both
def test_what_comes_back_to_a_stage_that_ends_its_part_is_waited_for(transport: str) -> None:
    async def scenario(graph: Graph) -> None:
        job = await graph.submit({"sleep": 0.3, "back": True})
        assert (await job.result()).meta == {"asked": True, "seen": True, "returned": 1}
        assert graph._runs == {}

    play(scenario, transport)


@both
def test_a_cancelled_job_leaves_every_stage(transport: str) -> None:
    async def scenario(graph: Graph) -> None:
        job = await graph.submit({"steps": 10_000, "sleep": 0.002})
        await until(lambda: inside(graph) == {FIRST: 1, SECOND: 1}, 30)
        assert job.cancel()
        with pytest.raises(CancelledError):
            await job.result()
        await until(lambda: inside(graph) == {FIRST: 0, SECOND: 0}, 30)
        late = await graph.submit({"steps": 10_000, "sleep": 0.002}, deadline=0.2)
        with pytest.raises(Exception, match="was not done"):
            await late.result()
        await until(lambda: inside(graph) == {FIRST: 0, SECOND: 0}, 30)

    play(scenario, transport)


def test_a_dead_stage_is_told_of_and_started_again_and_the_others_live_on(tmp_path: Path) -> None:
    end = tmp_path / "end"

    async def scenario(graph: Graph) -> None:
        first, second = pid_of(graph, FIRST), pid_of(graph, SECOND)
        payload = {"steps": 20, "sleep": 0.01, "hold": str(end)}
        job = await graph.submit(payload)
        aside = await graph.submit({**payload, "alone": True})
        kinds: list[str] = []

        async def listen() -> None:
            kinds.extend([event.kind async for event in job.events()])

        following = asyncio.create_task(listen())
        await until(lambda: inside(graph).get(SECOND) == 1, 30)
        os.kill(second, signal.SIGKILL)
        await until(lambda: graph.health().restarts == 1, 30)
        health = graph.health()
        assert not health.ready and health.reason.startswith(f"Stage {SECOND}")
        end.touch()
        assert (await job.result()).meta == {"counted": 20, "sum": 20 * 21}
        await aside.result()
        await following
        assert "attempt" in kinds
        assert (job.snapshot().attempt, aside.snapshot().attempt) == (2, 1)
        assert pid_of(graph, FIRST) == first and pid_of(graph, SECOND) != second
        assert graph.health().ready

    limits = dataclasses.replace(QUICK, backoff_first=0.5, steady=60.0)
    play(scenario, limits=limits)


def test_a_job_that_kills_a_stage_twice_is_given_up_and_its_companions_are_not() -> None:
    async def scenario(graph: Graph) -> None:
        early = await graph.submit({"steps": 40, "sleep": 0.005})
        poison = await graph.submit({"steps": 9, "sleep": 0.005, "crash": SECOND, "at": 3})
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            await poison.result()
        late = await graph.submit({"steps": 3})
        assert (await early.result()).meta["sum"] == 40 * 41
        assert (await late.result()).meta["sum"] == 12
        assert graph.health().restarts == 2 and graph._runs == {}

    play(scenario)


def test_what_is_for_a_stage_that_loads_waits_for_it() -> None:
    async def scenario(graph: Graph) -> None:
        job = await graph.submit({"steps": 5})
        assert (await job.result()).meta["sum"] == 30

    play(scenario, wait=False, second={"load_sleep": 0.5})


def test_a_stage_that_cannot_start_is_the_reason_of_all(tmp_path: Path) -> None:
    flag = tmp_path / "bad"
    flag.touch()

    async def scenario(graph: Graph) -> None:
        waiting = await graph.submit({"steps": 3})
        with pytest.raises(SetupError, match="weights are bad"):
            await graph.ready()
        with pytest.raises(UnavailableError, match=SECOND):
            await waiting.result()
        with pytest.raises(UnavailableError):
            await graph.submit({"steps": 3})
        flag.unlink()
        await until(lambda: graph.health().ready, 60)
        assert (await (await graph.submit({"steps": 3})).result()).meta["sum"] == 12

    play(scenario, wait=False, second={"refuse_while": str(flag)})
