"""Run a scenario against a coordinator with the small worker, and look for what it left behind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.limits import Limits
from sgl_diffusion.orchestrator.topology import App, StageSpec
from sgl_diffusion.orchestrator.transport import ProcessTransport, ThreadTransport, Transport

TRANSPORTS: dict[str, type[ProcessTransport] | type[ThreadTransport]] = {
    "process": ProcessTransport,
    "thread": ThreadTransport,
}
QUICK = Limits(
    heartbeat=0.2, silence=20.0, load_silence=30.0, leave=5.0, term=0.3, backoff_first=0.05,
    steady=0,
)  # fmt: skip
HASTY = dataclasses.replace(QUICK, silence=1.0)  # for a worker that falls silent


def small_app(replicas: int = 1, **config: Any) -> App:
    entry = "tests.orchestrator.small_worker:make_worker"
    stage = StageSpec(name="work", entry=entry, config=config, replicas=replicas)
    return App(name="small", stages=(stage,))


def play(
    scenario: Callable[[Coordinator], Awaitable[None]],
    transport: str = "process",
    *,
    limits: Limits = QUICK,
    max_jobs: int = 300,
    wait: bool = True,
    **config: Any,
) -> None:
    """Start, run the scenario, stop; no child and no task may remain."""

    async def story() -> None:
        chosen: Transport = TRANSPORTS[transport]()
        coordinator = Coordinator(
            small_app(**config), transport=chosen, limits=limits, max_jobs=max_jobs
        )
        await coordinator.start()
        try:
            if wait:
                await coordinator.ready()
            await scenario(coordinator)
        finally:
            await coordinator.stop()
        assert coordinator.health().state == "stopped"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(story())
    assert children() == []


def children(parent: int | None = None) -> list[int]:
    listed = Path(f"/proc/{parent or os.getpid()}/task").glob("*/children")
    found = []
    for path in listed:  # of threads, some of which may end meanwhile
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(pid) for pid in path.read_text().split()]
    return found


def descriptors() -> Counter[str]:
    """What is open, by kind and number, but for garbage. Of two times `later - sooner` is new:
    what an earlier test left to a thread may go away at any time."""
    gc.collect()
    opened: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            opened[os.readlink(f"/proc/self/fd/{number}")] += 1
    return opened


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.01)
