"""What runs inside a stage: the contract between the orchestrator and an app's worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from sgl_diffusion.base.errors import SglError
from sgl_diffusion.orchestrator.messages import Metric, Payload


class Outbox(Protocol):
    """How a worker reports; every call returns at once."""

    def loading(self, note: str) -> None: ...

    def progress(self, job_id: str, step: int, total: int, phase: str) -> None: ...

    def output(self, job_id: str, meta: Payload, arrays: list[Any], *, final: bool = True) -> None:
        """Send arrays (anything numpy can view without a copy) with their description.

        They are copied after the step, so the worker does not write to them again.
        """

    def failed(self, job_id: str, error: SglError) -> None: ...

    def poll(self) -> None:
        """Take in waiting messages and send a heartbeat: for workers whose step is long."""


class GraphOutbox(Outbox, Protocol):
    """That of a stage of several. With the final output it says that its part is done; what every
    stage gives with it is put together."""

    def hand_on(self, job_id: str, stage: str, meta: Payload, arrays: list[Any]) -> None:
        """Send something of a job to another stage, which gets it by `Downstream.feed`."""


class CannotGoOnError(Exception):
    """Raised by a worker that is in no known state: the stage ends and a new one is started."""


class Worker(Protocol):
    """One model at work. All calls come from one thread, between steps or inside `Outbox.poll`.

    Inside `Outbox.poll` only `submit`, `feed`, `cancel`, `running` and `metrics` are called. An
    exception out of `step` ends the jobs in the worker, each of which is cancelled first; if there
    is none, if cancelling raises too, or if it is a `CannotGoOnError`, the stage ends and a new one
    is started.
    """

    def load(self) -> Payload:
        """Load the model; returns the card sent to the coordinator."""

    def submit(self, job_id: str, payload: Payload) -> None:
        """Accept a job; an error is reported through the outbox, never raised."""

    def cancel(self, job_id: str) -> None:
        """Drop a job at the next step boundary, without an answer; unknown ids are fine."""

    def control(self, action: str, payload: Payload) -> Payload:
        """Run a control action between steps; raises SglError, or CannotGoOnError."""

    def step(self) -> bool:
        """Do one unit of work; False when there was nothing to do."""

    def running(self) -> int:
        """How many jobs are in the worker."""

    def metrics(self) -> list[Metric]:
        """Samples as they stand; asked for often, but only after `load`."""


@runtime_checkable
class Downstream(Worker, Protocol):
    """A worker behind another stage, which makes jobs for it."""

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        """Take what another stage made of a job; the first opens it here. An error is reported
        through the outbox, never raised."""


WorkerFactory = Callable[[Payload, Outbox], Worker]
