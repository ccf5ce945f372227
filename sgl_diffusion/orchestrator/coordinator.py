"""Jobs between their submitters and the stage: admission, dispatch, retry, cancel, drain.

All state belongs to one event loop. Every admitted job goes to the stage as soon as that is ready:
the engine batches, so it has to see them all. If it dies, unfinished jobs go to its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any

from numpy.typing import NDArray

from sgl_diffusion.base.errors import (
    ConflictError,
    RequestError,
    SglError,
    UnavailableError,
    from_wire,
)
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator import endings, messages
from sgl_diffusion.orchestrator.controls import Controls
from sgl_diffusion.orchestrator.frames import MAX_BODY
from sgl_diffusion.orchestrator.gate import Gate, GateState
from sgl_diffusion.orchestrator.job import Job, JobHandle, JobOutput, jobs_ahead
from sgl_diffusion.orchestrator.limits import Health, Limits
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
    Submit,
)
from sgl_diffusion.orchestrator.replicas import Replica, Replicas, assign
from sgl_diffusion.orchestrator.suspects import accuse
from sgl_diffusion.orchestrator.tally import Tally, gauges, restarts
from sgl_diffusion.orchestrator.topology import App
from sgl_diffusion.orchestrator.transport import ProcessTransport, Transport

log = get_logger(__name__)


class Coordinator:
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
        assert len(app.stages) == 1, f"app {app.name}: jobs are routed through one stage"
        self._limits = limits or Limits()
        self._replicas = Replicas(
            app.stages[0], transport or ProcessTransport(), self._limits, self, log_level
        )
        self.replicas = app.stages[0].replicas
        self._max_jobs = max_jobs
        self._jobs: dict[str, Job] = {}
        self._controls = Controls()
        self._gate = Gate(self._dispatch, lambda: len(self._let_in()))
        self._tally = Tally()
        self._drain_until: float | None = None
        self._nudge = asyncio.Event()
        self._stop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the stage; returns at once, it loads in the background."""
        self._replicas.start()

    async def ready(self) -> None:
        """Wait until jobs can run; raises the stage's error if it cannot start."""
        if not await self._replicas.until_ready():
            raise self.unavailable()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new jobs, wait for the unfinished ones, fail the rest, end the stage.

        A second call waits for the same end; it may only shorten the drain.
        """
        until = time.monotonic() + drain_seconds
        if self._drain_until is None or until < self._drain_until:
            self._drain_until = until
        self._nudge.set()
        if self._stop is None:
            self._stop = asyncio.create_task(self._drain_and_stop())
        await asyncio.shield(self._stop)

    async def submit(
        self,
        payload: Payload,
        *,
        job_id: str | None = None,
        deadline: float | None = None,
        attempt: int = 1,
        weight: float = 1.0,
    ) -> JobHandle:
        """Admit a job; `deadline` is in seconds from now, `attempt` above 1 if it ran before,
        `weight` is its work compared with that of others."""
        if self._drain_until is not None or self._replicas.state in ("failed", "stopped"):
            raise self.unavailable()
        if len(self._jobs) >= self._max_jobs:
            raise self._tally.refuse(len(self._jobs))
        job = Job(
            id=job_id or uuid.uuid4().hex,
            payload=payload,
            submitted_at=time.monotonic(),
            position=lambda job: jobs_ahead(self._jobs.values(), job),
            attempt=attempt,
            weight=weight,
        )
        if job.id in self._jobs:
            raise ConflictError(f"There is an unfinished job {job.id!r} already.")
        if len(messages.encode(Submit(job.id, payload))) > MAX_BODY:
            raise RequestError(f"The request is larger than {MAX_BODY >> 20} MiB.")
        self._jobs[job.id] = job
        if deadline is not None:
            later = asyncio.get_running_loop().call_later
            job.timer = later(deadline, self._call_off, job, endings.too_late(deadline))
        self._gate.enter(job)
        return JobHandle(job, self.cancel)

    def cancel(self, job_id: str) -> bool:
        """End a job now, with CancelledError; the stage drops it at the next step boundary."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        self._call_off(job, endings.cancelled())
        return True

    async def control(self, action: str, payload: Payload) -> Payload:
        """Run an action in one replica, between steps. It is never retried."""
        return await self._controls.run(self._ready()[0], action, payload)

    async def control_all(self, action: str, payload: Payload) -> list[Payload]:
        """The same in every replica, also in those that are being loaded."""
        self._ready()
        await self._replicas.settled()
        return await self._controls.run_in_all(self._ready(), action, payload)

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
        """What the stage said of itself when it was last ready."""
        return self._replicas.card

    def unavailable(self) -> UnavailableError:
        """Why no job can be taken now."""
        if self._drain_until is not None:
            return UnavailableError("The server is stopping.", hint="Try again later.")
        health = self.health()
        return UnavailableError(f"No worker is ready: {health.reason}", hint="Try again later.")

    def metrics(self) -> list[Metric]:
        """Samples of the stage and of the coordinator; gauges as they stand now."""
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
                if job := self._begin(job_id):
                    job.advance(message)
            case Output(job_id, meta, _, final):
                # Credited here and not when it is read: whoever waits for another job first must
                # not stop the stage from sending that one.
                replica.send(Credit(1))
                if job := self._begin(job_id):
                    if final:
                        self._complete(job, JobOutput(arrays, meta))
                    else:
                        job.part(JobOutput(arrays, meta))
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
            self._fail(job, endings.worker_lost(reason, why, job.attempt))
        self._dispatch()

    def replica_unavailable(self, replica: Replica, error: SglError) -> None:
        self._leave(replica, str(error))
        if self._replicas.state == "failed":
            self._gate.close(self.unavailable())
            for job in list(self._jobs.values()):
                self._fail(job, self.unavailable())

    # -- inside -----------------------------------------------------------------------------------

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

    def _begin(self, job_id: str) -> Job | None:
        job = self._jobs.get(job_id)
        if job is not None and not job.begun and job.attempt == 1:
            self._tally.began(job.submitted_at)
        return job

    def _complete(self, job: Job, output: JobOutput) -> None:
        self._end(job, "completed")
        job.complete(output)

    def _fail(self, job: Job, error: SglError) -> None:
        self._end(job, error.code)
        job.fail(error)

    def _end(self, job: Job, outcome: str) -> None:
        del self._jobs[job.id]
        self._tally.ended(outcome, job.submitted_at)
        self._gate.left(job)
        self._nudge.set()
        if job.suspect or any(other.suspect for other in self._jobs.values()):
            self._dispatch()

    def _call_off(self, job: Job, error: SglError) -> None:
        if job.replica is not None:
            job.replica.send(Cancel(job.id))
            self._tally.cancelling(job.id)
        self._fail(job, error)

    async def _drain_and_stop(self) -> None:
        while self._jobs and self._replicas.state != "failed":
            assert self._drain_until is not None
            left = self._drain_until - time.monotonic()
            if left <= 0:
                break
            self._nudge.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudge.wait(), left)
        error = endings.server_stopped()
        for job in list(self._jobs.values()):
            self._call_off(job, error)
        self._gate.close(error)
        await self._replicas.stop()
        self._gate.stage(ready=False)
        self._controls.lost(None, "was stopped")
