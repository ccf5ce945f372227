"""The replicas of a stage: processes that do the same, each alive by itself, each with its jobs.

A job goes to the replica with the least left to do. What a replica leaves behind when it dies goes
to the others. Changes are made in all of them; one that cannot make a change that others made is
started again, as replicas that differ would answer differently.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from numpy.typing import NDArray

from sgl_diffusion.base.errors import SglError
from sgl_diffusion.orchestrator.channel import Arrays
from sgl_diffusion.orchestrator.job import Job
from sgl_diffusion.orchestrator.limits import Health, Limits, State
from sgl_diffusion.orchestrator.messages import FromStage, Metric, Payload, Submit, ToStage
from sgl_diffusion.orchestrator.supervise import Supervisor
from sgl_diffusion.orchestrator.topology import StageSpec
from sgl_diffusion.orchestrator.transport import Link, Transport

# Of several replicas: what the stage is if one of them is it.
_FIRST: tuple[State, ...] = ("ready", "loading", "restarting", "failed", "stopped")


class Owner(Protocol):
    """Who is told about the replicas; every call comes from their event loop."""

    def replica_ready(self, replica: Replica) -> None: ...

    def replica_sent(
        self, replica: Replica, message: FromStage, arrays: list[NDArray[Any]]
    ) -> None: ...

    def replica_lost(self, replica: Replica, reason: str, why: str) -> None:
        """It died and is started again."""

    def replica_unavailable(self, replica: Replica, error: SglError) -> None:
        """It cannot start; it is tried again later."""


class Replica:
    """One of them. `link` is there while jobs can run in it."""

    def __init__(
        self, spec: StageSpec, transport: Transport, limits: Limits, owner: Owner, log_level: str
    ) -> None:
        self._owner = owner
        self.name = spec.name
        self.link: Link | None = None
        self.supervisor = Supervisor(spec, transport, limits, self, log_level)

    def send(self, message: ToStage, arrays: Arrays = ()) -> None:
        """A message to a replica that is gone is dropped."""
        if self.link is not None:
            self.link.send(message, arrays)

    def take(self, job: Job) -> None:
        job.replica = self
        self.send(Submit(job.id, job.payload, job.attempt))

    def stage_ready(self, link: Link) -> None:
        self.link = link
        self._owner.replica_ready(self)

    def stage_sent(self, message: FromStage, arrays: list[NDArray[Any]]) -> None:
        self._owner.replica_sent(self, message, arrays)

    def stage_lost(self, reason: str, why: str) -> None:
        self.link = None
        self._owner.replica_lost(self, reason, why)

    def stage_unavailable(self, error: SglError) -> None:
        self.link = None
        self._owner.replica_unavailable(self, error)


class Replicas:
    """All replicas of one stage, seen as one."""

    def __init__(
        self, spec: StageSpec, transport: Transport, limits: Limits, owner: Owner, log_level: str
    ) -> None:
        self._all = [
            Replica(each, transport, limits, owner, log_level) for each in spec.replicated()
        ]
        self._supervisors = [replica.supervisor for replica in self._all]

    def start(self) -> None:
        for supervisor in self._supervisors:
            supervisor.start()

    async def stop(self) -> None:
        await asyncio.gather(*(supervisor.stop() for supervisor in self._supervisors))
        for replica in self._all:
            replica.link = None

    async def until_ready(self) -> bool:
        """False if they are stopped before; raises why no replica can start."""
        while (state := self.state) not in ("ready", "stopped"):
            errors = [supervisor.error for supervisor in self._supervisors]
            if errors[0] is not None and all(errors):
                raise errors[0]
            await self.changed()
        return state == "ready"

    async def changed(self) -> None:
        """Wait for the next change of state of any of them."""
        waits = [asyncio.ensure_future(one.changed()) for one in self._supervisors]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def settled(self) -> None:
        """Wait until none is being loaded, unless none is ready: who loads may have read what a
        change changes."""
        while self.ready() and any(one.loading for one in self._supervisors):
            await self.changed()

    def ready(self) -> list[Replica]:
        return [replica for replica in self._all if replica.link is not None]

    @property
    def state(self) -> State:
        states = {supervisor.state for supervisor in self._supervisors}
        return next(state for state in _FIRST if state in states)

    @property
    def card(self) -> Payload | None:
        """What one of them said of itself when it was last ready."""
        cards = [supervisor.card for supervisor in self._supervisors]
        return next((card for card in cards if card is not None), None)

    @property
    def restarts(self) -> Counter[str]:
        return sum((supervisor.restarts for supervisor in self._supervisors), Counter())

    def health(self) -> Health:
        each = [supervisor.health() for supervisor in self._supervisors]
        best = min(each, key=lambda health: _FIRST.index(health.state))
        lacking = [health for health in each if not health.ready]
        reason = best.reason
        if best.ready and lacking:
            reason = f"{len(lacking)} of {len(each)} replicas: {lacking[0].reason}"
        return dataclasses.replace(
            best, reason=reason, restarts=sum(health.restarts for health in each)
        )

    def metrics(self) -> list[Metric]:
        """The samples of each; if there are several, they say whose they are."""
        if len(self._all) == 1:
            return self._supervisors[0].metrics
        return [
            Metric(sample.name, sample.value, {**sample.labels, "replica": str(index)}, sample.kind)
            for index, supervisor in enumerate(self._supervisors)
            for sample in supervisor.metrics
        ]


def assign(jobs: Collection[Job], replicas: Collection[Replica]) -> Iterator[tuple[Job, Replica]]:
    """Which of the jobs that wait go where now.

    A suspect is the only one in its replica, and only one suspect runs at a time: so the next death
    has one possible cause. Until one of the replicas is empty, the one with the fewest jobs gets
    no more of them.
    """
    inside: dict[Replica, list[Job]] = {replica: [] for replica in replicas}
    for job in jobs:
        if job.replica in inside:
            inside[job.replica].append(job)
    suspects = [job for job in jobs if job.suspect]
    if inside and suspects:
        held = next((job.replica for job in suspects if job.replica in inside), None)
        if held is None:
            held = min(inside, key=lambda replica: len(inside[replica]))
            if not inside[held]:
                yield suspects[0], held
        assert held is not None
        del inside[held]
    left = {replica: sum(map(_left, there)) for replica, there in inside.items()}
    for job in jobs if left else ():
        if job.replica is None and not job.suspect:
            chosen = min(left, key=lambda replica: left[replica])
            left[chosen] += _left(job)
            yield job, chosen


def _left(job: Job) -> float:
    return job.weight * (1 - job.percent / 100)
