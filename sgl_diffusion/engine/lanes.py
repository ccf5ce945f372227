"""Lanes of denoise steps: batches that take their steps at the same time, each in a thread.

A pass that is small for a CPU leaves most of its threads idle. In a lane it gets a share of them,
and the other lanes have the rest. Who is in a lane, and what comes of it, is decided by the thread
that drives the runner, between steps; a batch with a share of one lane has the device to itself.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sgl_diffusion.components.samplers import SolverState
from sgl_diffusion.engine.job import Group
from sgl_diffusion.engine.lineup import Batch
from sgl_diffusion.engine.threads import lane_threads, pool_of

Work = Callable[[], list[SolverState]]


@dataclass(frozen=True)
class Done:
    """A step that was made in so many seconds: what the rows came to, or why they did not. Its
    group had this weight when it began."""

    batch: Batch
    weight: float
    states: list[SolverState]
    error: Exception | None
    seconds: float


class StepLanes:
    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: dict[Future[Done], Group] = {}

    @property
    def free(self) -> bool:
        return len(self._under_way) < self._count

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    @property
    def groups(self) -> set[Group]:
        """Whose steps are under way."""
        return set(self._under_way.values())

    @property
    def futures(self) -> list[Future[Done]]:
        return list(self._under_way)

    def start(self, batch: Batch, weight: float, work: Work) -> None:
        """What comes of it comes out of `collect`."""
        assert self.free, "all lanes are busy"
        if self._pool is None:
            self._pool = pool_of(self._count, lane_threads(self._count), "sgld-denoise")
        self._under_way[self._pool.submit(_run, batch, weight, work)] = batch.job.group

    def collect(self) -> list[Done]:
        """What is done."""
        done = [future for future in self._under_way if future.done()]
        for future in done:
            del self._under_way[future]
        return [future.result() for future in done]

    def wait(self, seconds: float) -> None:
        """Until something is done, or so long."""
        concurrent.futures.wait(self.futures, seconds, concurrent.futures.FIRST_COMPLETED)


def _run(batch: Batch, weight: float, work: Work) -> Done:
    start = time.perf_counter()
    states: list[SolverState] = []
    error = None
    try:
        states = work()
    except Exception as caught:
        error = caught
    return Done(batch, weight, states, error, time.perf_counter() - start)
