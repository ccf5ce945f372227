"""Jobs between their submitters and the one stage of an app: dispatch, retry, changes.

Every admitted job goes to the stage as soon as that is ready: the engine batches, so it has to see
them all. If it dies, unfinished jobs go to its successor.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from sgl_diffusion.base.errors import SglError, from_wire
from sgl_diffusion.orchestrator import endings
from sgl_diffusion.orchestrator.controls import Controls
from sgl_diffusion.orchestrator.desk import Desk
from sgl_diffusion.orchestrator.gate import Gate, GateState
from sgl_diffusion.orchestrator.job import Job, JobOutput
from sgl_diffusion.orchestrator.limits import Health, Limits, State
from sgl_diffusion.orchestrator.messages import (
    Cancel,
    ControlDone,
    Credit,
    Dropped,
    Failed,
    FromStage,
    Metric,
    Output,
    Payload,
    Progress,
)
from sgl_diffusion.orchestrator.replicas import Replica, Replicas, assign
from sgl_diffusion.orchestrator.suspects import accuse
from sgl_diffusion.orchestrator.tally import gauges, restarts
from sgl_diffusion.orchestrator.topology import App
from sgl_diffusion.orchestrator.transport import ProcessTransport, Transport


class Coordinator(Desk):
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
        assert len(app.stages) == 1, f"app {app.name}: a graph is for several stages"
        super().__init__(max_jobs)
        self._limits = limits or Limits()
        self._replicas = Replicas(
            app.stages[0], transport or ProcessTransport(), self._limits, self, log_level
        )
        self.replicas = app.stages[0].replicas
        self._controls = Controls()
        self._gate = Gate(self._dispatch, lambda: len(self._let_in()))

    async def start(self) -> None:
        self._replicas.start()

    async def ready(self) -> None:
        if not await self._replicas.until_ready():
            raise self.unavailable()

    async def control(self, action: str, payload: Payload) -> Payload:
        """Run an action in one replica, between steps. It is never retried."""
        return await self._controls.run(self._ready()[0], action, payload)

    async def control_all(self, action: str, payload: Payload) -> list[Payload]:
        """The same in every replica, also in those that are being loaded."""
        self._ready()
        await self._replicas.settled()
        return await self._controls.run_in_all(self._ready(), action, payload)

    async def control_any(self, action: str, payload: Payload) -> dict[str, Payload]:
        """The same in every replica that is ready: the answers of those that did it, by name.
        Raises what the first has raised if none did."""
        replicas = self._ready()
        outcomes = await self._controls.outcomes(replicas, action, payload)
        pairs = zip(replicas, outcomes, strict=True)
        done = {one.name: out for one, out in pairs if not isinstance(out, BaseException)}
        if not done and isinstance(outcomes[0], BaseException):
            raise outcomes[0]
        return done

    async def change(self, action: str, payload: Payload, timeout: float) -> Payload:
        """Run an action that jobs depend on: when all jobs before it have ended, for which it waits
        `timeout` seconds, and before any job after it begins."""
        self._ready()

        async def work() -> Payload:
            await self._replicas.settled()
            return await self._controls.change(self._ready(), action, payload)

        return await self._gate.change(work, timeout)

    def gate(self) -> GateState:
        """Whether a change waits or is being made, and who waits for it."""
        return self._gate.state()

    def health(self) -> Health:
        return self._replicas.health()

    def card(self) -> Payload | None:
        return self._replicas.card

    def metrics(self) -> list[Metric]:
        return [
            *self._replicas.metrics(),
            *self._tally.metrics(),
            *gauges(self._jobs.values(), self._gate.state(), ready=bool(self._replicas.ready())),
            *restarts(self._replicas.restarts),
        ]

    # -- from the replicas ------------------------------------------------------------------------

    def replica_ready(self, replica: Replica) -> None:
        self._dispatch()
        self._gate.stage(ready=True)

    def replica_sent(
        self, replica: Replica, message: FromStage, arrays: list[NDArray[Any]]
    ) -> None:
        match message:
            case Progress(job_id):
                if job := self._begun(job_id):
                    job.advance(message)
            case Output(job_id, meta, _, final):
                # Credited here and not when it is read: whoever waits for another job first must
                # not stop the stage from sending that one.
                if arrays:
                    replica.send(Credit(1))
                if job := self._begun(job_id):
                    if final:
                        self._complete(job, JobOutput(arrays, meta))
                    else:
                        self._part(job, JobOutput(arrays, meta))
            case Failed(error, job_id):
                if job := self._jobs.get(job_id or ""):
                    self._fail(job, from_wire(error))
            case Dropped(job_id):
                self._tally.dropped(job_id)
            case ControlDone():
                self._controls.done(message)

    def replica_lost(self, replica: Replica, reason: str, why: str) -> None:
        self._leave(replica, why)
        inside = [job for job in self._jobs.values() if job.replica is replica]
        for job in accuse(inside, self._limits.attempts):
            self._fail(job, endings.worker_lost(reason, why, job))
        self._dispatch()

    def replica_unavailable(self, replica: Replica, error: SglError) -> None:
        self._leave(replica, str(error))
        if self._replicas.state == "failed":
            self._gate.close(self.unavailable())
            for job in list(self._jobs.values()):
                self._fail(job, self.unavailable())

    # -- inside -----------------------------------------------------------------------------------

    def _state(self) -> State:
        return self._replicas.state

    def _enter(self, job: Job) -> None:
        self._gate.enter(job)

    def _begun(self, job_id: str) -> Job | None:
        job = self._jobs.get(job_id)
        if job is not None:
            self._begin(job)
        return job

    def _ready(self) -> list[Replica]:
        ready = self._replicas.ready()
        if not ready or self._drain_until is not None:
            raise self.unavailable()
        return ready

    def _dispatch(self) -> None:
        for job, replica in list(assign(self._let_in(), self._replicas.ready())):
            replica.take(job)

    def _let_in(self) -> list[Job]:
        return [job for job in self._jobs.values() if not self._gate.holds(job)]

    def _leave(self, replica: Replica, why: str) -> None:
        self._tally.stage_lost()
        self._gate.stage(ready=bool(self._replicas.ready()))
        self._controls.lost(replica, why)

    def _withdraw(self, job: Job) -> None:
        if job.replica is not None:
            job.replica.send(Cancel(job.id))
            self._tally.cancelling(job.id)

    def _left(self, job: Job) -> None:
        self._gate.left(job)
        if job.suspect or any(other.suspect for other in self._jobs.values()):
            self._dispatch()

    async def _end_stages(self, error: SglError) -> None:
        self._gate.close(error)
        await self._replicas.stop()
        self._gate.stage(ready=False)
        self._controls.lost(None, "was stopped")
