"""Jobs through an app of several stages: each lives in a process of its own, and pieces of a job
go from one to the next while the earlier one still works on it.

A job begins in the first stage. What a stage sends `to` another goes there, the rest to whoever
asked; a job has ended when every stage that got something of it has done its part. A stage that
dies is started again, the others live on. The jobs that had something in it begin anew in all
stages, under another name, so that nothing late of the first attempt slips into the second.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from sgl_diffusion.base.errors import SglError, from_wire
from sgl_diffusion.orchestrator import endings, relay
from sgl_diffusion.orchestrator.desk import Desk
from sgl_diffusion.orchestrator.gate import GateState
from sgl_diffusion.orchestrator.job import Job, JobOutput
from sgl_diffusion.orchestrator.limits import Health, Limits, State
from sgl_diffusion.orchestrator.messages import (
    Cancel,
    Credit,
    Dropped,
    Failed,
    Feed,
    FromStage,
    Metric,
    Output,
    Payload,
    Progress,
    Submit,
)
from sgl_diffusion.orchestrator.parts import Parts
from sgl_diffusion.orchestrator.replicas import Replica, Replicas
from sgl_diffusion.orchestrator.suspects import accuse
from sgl_diffusion.orchestrator.tally import gauges, restarts
from sgl_diffusion.orchestrator.topology import App
from sgl_diffusion.orchestrator.transport import ProcessTransport, Transport

_WORST: tuple[State, ...] = ("stopped", "failed", "restarting", "loading", "ready")


@dataclass(eq=False)
class _Run:
    """One attempt of a job. `sent` counts what went to each stage since it was open, `held` is what
    waits for a stage that is not ready."""

    id: str
    job: Job
    parts: Parts
    sent: Counter[str] = field(default_factory=Counter)
    held: dict[str, list[tuple[Submit | Feed, list[NDArray[Any]]]]] = field(default_factory=dict)


class Graph(Desk):
    """Make it anywhere, call everything else in one event loop."""

    def __init__(
        self,
        app: App,
        *,
        transport: Transport | None = None,
        limits: Limits | None = None,
        max_jobs: int = 128,
        log_level: str = "info",
    ) -> None:
        assert all(spec.replicas == 1 for spec in app.stages), "a stage of a graph has one process"
        super().__init__(max_jobs)
        self._limits = limits or Limits()
        self._first = app.stages[0].name
        carrier = transport or ProcessTransport()
        self._stages = {
            spec.name: Replicas(spec, carrier, self._limits, self, log_level) for spec in app.stages
        }
        self._runs: dict[str, _Run] = {}
        self._again: set[str] = set()
        self._serial = itertools.count(2)

    async def start(self) -> None:
        for stage in self._stages.values():
            stage.start()

    async def ready(self) -> None:
        waits = [asyncio.ensure_future(stage.until_ready()) for stage in self._stages.values()]
        try:
            if not all(await asyncio.gather(*waits)):
                raise self.unavailable()
        finally:
            for wait in waits:
                wait.cancel()

    def health(self) -> Health:
        """That of the stage that is worst off."""
        each = {name: stage.health() for name, stage in self._stages.items()}
        name = min(each, key=lambda name: _WORST.index(each[name].state))
        worst = each[name]
        reason = f"Stage {name}: {worst.reason}" if worst.reason else ""
        restarts = sum(health.restarts for health in each.values())
        return Health(worst.state, reason, restarts, worst.seconds)

    def card(self) -> Payload | None:
        card: Payload = {}
        for stage in self._stages.values():
            if stage.card is None:
                return None
            card |= stage.card
        return card

    def metrics(self) -> list[Metric]:
        ready = all(stage.ready() for stage in self._stages.values())
        found = [*self._tally.metrics(), *gauges(self._jobs.values(), _OPEN, ready=ready)]
        for name, stage in self._stages.items():
            for sample in (*stage.metrics(), *restarts(stage.restarts)):
                labels = {**sample.labels, "stage": name}
                found.append(Metric(sample.name, sample.value, labels, sample.kind))
        return found

    # -- from the stages --------------------------------------------------------------------------

    def replica_ready(self, replica: Replica) -> None:
        for run in list(self._runs.values()):
            for message, arrays in run.held.pop(replica.name, []):
                replica.send(message, arrays)

    def replica_sent(
        self, replica: Replica, message: FromStage, arrays: list[NDArray[Any]]
    ) -> None:
        match message:
            case Progress(run_id):
                if run := self._begun(run_id):
                    run.job.advance(message)
            case Output(run_id):
                if arrays:
                    replica.send(Credit(1))
                if run := self._begun(run_id):
                    self._output(run, replica.name, message, arrays)
            case Failed(error, run_id):
                if run := self._runs.get(run_id or ""):
                    self._let_go(run)
                    self._fail(run.job, from_wire(error))
            case Dropped(run_id):
                self._tally.dropped(run_id)

    def replica_lost(self, replica: Replica, reason: str, why: str) -> None:
        self._tally.stage_lost()
        inside = [run for run in self._runs.values() if _was_in(run, replica.name)]
        for run in inside:
            self._again.add(run.job.id)
            self._let_go(run)
        for job in accuse([run.job for run in inside], self._limits.attempts):
            self._fail(job, endings.worker_lost(reason, why, job))
        self._dispatch()

    def replica_unavailable(self, replica: Replica, error: SglError) -> None:
        self._tally.stage_lost()
        for job in list(self._jobs.values()):
            self._call_off(job, self.unavailable())

    # -- inside -----------------------------------------------------------------------------------

    def _state(self) -> State:
        states = {stage.state for stage in self._stages.values()}
        return next(state for state in _WORST if state in states)

    def _enter(self, job: Job) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        """Start what waits. A suspect runs alone, so that the next death has one possible cause;
        whoever came after it waits."""
        running = {run.job for run in self._runs.values()}
        suspect = next((job for job in self._jobs.values() if job.suspect), None)
        if suspect is not None:
            if not running:
                self._start(suspect)
            return
        for job in self._jobs.values():
            if job not in running:
                self._start(job)

    def _start(self, job: Job) -> None:
        name = f"{job.id}~{next(self._serial)}" if job.id in self._again else job.id
        run = self._runs[name] = _Run(name, job, Parts(self._first))
        self._send(run, self._first, Submit(name, job.payload, job.attempt), [])

    def _output(self, run: _Run, stage: str, message: Output, arrays: list[NDArray[Any]]) -> None:
        if message.to:
            run.parts.sent(message.to)
            data = relay.inside(arrays, message.arrays)
            feed = Feed(run.id, message.meta, message.arrays, data)
            self._send(run, message.to, feed, arrays)
        elif not message.final:
            self._part(run.job, JobOutput(arrays, message.meta))
        else:
            run.sent[stage] -= message.taken
            if run.sent[stage]:  # it knew nothing of what is still on its way there
                run.parts.gave(message.meta, arrays)
            elif run.parts.ended(stage, message.meta, arrays):
                self._complete(run.job, JobOutput(run.parts.arrays, run.parts.meta))

    def _send(
        self, run: _Run, stage: str, message: Submit | Feed, arrays: list[NDArray[Any]]
    ) -> None:
        run.sent[stage] += 1
        ready = self._stages[stage].ready()
        if ready:
            ready[0].send(message, arrays)
        else:
            run.held.setdefault(stage, []).append((message, arrays))

    def _begun(self, run_id: str) -> _Run | None:
        run = self._runs.get(run_id)
        if run is not None:
            self._begin(run.job)
        return run

    def _run_of(self, job: Job) -> _Run | None:
        return next((run for run in self._runs.values() if run.job is job), None)

    def _withdraw(self, job: Job) -> None:
        run = self._run_of(job)
        if run is not None:
            self._let_go(run)
            self._tally.cancelling(run.id)

    def _let_go(self, run: _Run) -> None:
        del self._runs[run.id]
        for name in run.parts.open:
            for replica in self._stages[name].ready():
                replica.send(Cancel(run.id))

    def _left(self, job: Job) -> None:
        run = self._run_of(job)
        if run is not None:  # it is whole: nobody holds anything of it
            del self._runs[run.id]
        self._again.discard(job.id)
        self._dispatch()

    async def _end_stages(self, error: SglError) -> None:
        await asyncio.gather(*(stage.stop() for stage in self._stages.values()))


def _was_in(run: _Run, stage: str) -> bool:
    """Whether the stage got something of it; what waits for the stage has not."""
    return stage in run.parts.open and stage not in run.held


_OPEN = GateState(changing=False, changes=0, held=0, ahead=0)
