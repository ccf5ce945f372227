"""Jobs from their admission to their end, whichever stages they run in.

All state belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from abc import ABC, abstractmethod

from sgl_diffusion.base.errors import ConflictError, RequestError, SglError, UnavailableError
from sgl_diffusion.orchestrator import endings, messages
from sgl_diffusion.orchestrator.frames import MAX_BODY
from sgl_diffusion.orchestrator.job import Asked, Job, JobHandle, JobOutput, jobs_ahead
from sgl_diffusion.orchestrator.limits import Health, State
from sgl_diffusion.orchestrator.messages import Metric, Payload, Submit
from sgl_diffusion.orchestrator.tally import Tally


class Desk(ABC):
    """Make it anywhere, call everything else in one event loop."""

    def __init__(self, max_jobs: int) -> None:
        self._max_jobs = max_jobs
        self._jobs: dict[str, Job] = {}
        self._tally = Tally()
        self._drain_until: float | None = None
        self._nudge = asyncio.Event()
        self._stop: asyncio.Task[None] | None = None

    # -- what the stages are asked ----------------------------------------------------------------

    @abstractmethod
    async def start(self) -> None:
        """Start the stages; returns at once, they load in the background."""

    @abstractmethod
    async def ready(self) -> None:
        """Wait until jobs can run; raises the error of a stage that cannot start."""

    @abstractmethod
    def health(self) -> Health: ...

    @abstractmethod
    def card(self) -> Payload | None:
        """What the stages said of themselves when they were last ready."""

    @abstractmethod
    def metrics(self) -> list[Metric]:
        """Samples of the stages and of the desk; gauges as they stand now."""

    @abstractmethod
    def _state(self) -> State: ...

    @abstractmethod
    def _enter(self, job: Job) -> None:
        """A job was admitted."""

    @abstractmethod
    def _withdraw(self, job: Job) -> None:
        """Tell the stages to let go of a job."""

    @abstractmethod
    def _left(self, job: Job) -> None:
        """A job has ended, wherever it was."""

    @abstractmethod
    async def _end_stages(self, error: SglError) -> None: ...

    # -- what everybody may ask -------------------------------------------------------------------

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new jobs, wait for the unfinished ones, fail the rest, end the stages.

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
        asked: Asked | None = None,
    ) -> JobHandle:
        """Admit a job; `deadline` is in seconds from now, `attempt` above 1 if it ran before,
        `weight` is its work compared with that of others, `asked` is for the metrics."""
        if self._drain_until is not None or self._state() in ("failed", "stopped"):
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
            asked=asked or Asked(),
        )
        if job.id in self._jobs:
            raise ConflictError(f"There is an unfinished job {job.id!r} already.")
        if len(messages.encode(Submit(job.id, payload))) > MAX_BODY:
            raise RequestError(f"The request is larger than {MAX_BODY >> 20} MiB.")
        self._jobs[job.id] = job
        if deadline is not None:
            later = asyncio.get_running_loop().call_later
            job.timer = later(deadline, self._call_off, job, endings.too_late(deadline))
        self._enter(job)
        return JobHandle(job, self.cancel)

    def cancel(self, job_id: str) -> bool:
        """End a job now, with CancelledError; its stages drop it at the next step boundary."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        self._call_off(job, endings.cancelled())
        return True

    def unavailable(self) -> UnavailableError:
        """Why no job can be taken now."""
        if self._drain_until is not None:
            return UnavailableError("The server is stopping.", hint="Try again later.")
        health = self.health()
        return UnavailableError(f"No worker is ready: {health.reason}", hint="Try again later.")

    # -- inside -----------------------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        """Its first sign of life."""
        if not job.begun and job.attempt == 1:
            self._tally.began(job.asked)

    def _part(self, job: Job, output: JobOutput) -> None:
        """Something of its result, before the end."""
        if not job.shown:
            job.shown = True
            self._tally.shown(job.asked)
        job.part(output)

    def _complete(self, job: Job, output: JobOutput) -> None:
        self._end(job, "completed")
        job.complete(output)

    def _fail(self, job: Job, error: SglError) -> None:
        self._end(job, error.code)
        job.fail(error)

    def _end(self, job: Job, outcome: str) -> None:
        del self._jobs[job.id]
        self._tally.ended(outcome, job)
        self._left(job)
        self._nudge.set()

    def _call_off(self, job: Job, error: SglError) -> None:
        self._withdraw(job)
        self._fail(job, error)

    async def _drain_and_stop(self) -> None:
        while self._jobs and self._state() != "failed":
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
        await self._end_stages(error)
