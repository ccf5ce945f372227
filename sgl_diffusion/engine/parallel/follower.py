"""Every rank but the first: it does what it is told and reports to nobody.

A follower whose jobs are not those of the first rank leaves, and with it the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_diffusion.base.errors import RequestError, SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.distributed.group import Group
from sgl_diffusion.engine.lineup import Decode, Encode, Unit
from sgl_diffusion.engine.parallel.agreement import agree, together
from sgl_diffusion.engine.parallel.leader import take
from sgl_diffusion.engine.parallel.turn import Turn, decode_turn
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.orchestrator.messages import Control, Metric, Payload
from sgl_diffusion.orchestrator.stage import CannotGoOnError

log = get_logger(__name__)


class SilentOutbox:
    """Implements `orchestrator.stage.Outbox`: the first rank reports for all."""

    def loading(self, note: str) -> None: ...

    def progress(self, job_id: str, step: int, total: int, phase: str) -> None: ...

    def output(
        self, job_id: str, meta: Payload, arrays: list[Any], *, final: bool = True
    ) -> None: ...

    def failed(self, job_id: str, error: SglError) -> None:
        log.info("job %s: %s", job_id, error)

    def poll(self) -> None: ...


def follow(everyone: Group, worker: DiffusionWorker) -> None:
    """Load, then take turns until this process is ended."""
    try:
        together(everyone, worker.load)
    except SglError as error:
        log.info("rank %d waits for its end: %s", everyone.index, error)
    while True:
        _take_turn(everyone, worker, decode_turn(everyone.broadcast(None)))


class FollowingNode:
    """Implements `orchestrator.stage.Worker` for the first rank of a machine that only follows:
    whoever watches this process sees a worker that has no jobs."""

    def __init__(self, meet: Callable[[], tuple[Group, DiffusionWorker]]) -> None:
        self._meet = meet
        self._everyone: Group
        self._worker: DiffusionWorker

    def load(self) -> Payload:
        self._everyone, self._worker = self._meet()
        together(self._everyone, self._worker.load)
        return {}

    def submit(self, job_id: str, payload: Payload) -> None:
        raise AssertionError("jobs come from the first machine")

    def cancel(self, job_id: str) -> None:
        raise AssertionError("jobs come from the first machine")

    def control(self, action: str, payload: Payload) -> Payload:
        raise RequestError("This machine follows the first one.", code="not_supported")

    def step(self) -> bool:
        try:
            _take_turn(self._everyone, self._worker, decode_turn(self._everyone.broadcast(None)))
        except Exception as error:
            raise CannotGoOnError("this machine cannot follow the first one") from error
        return True

    def running(self) -> int:
        return 0

    def metrics(self) -> list[Metric]:
        return self._worker.metrics()


def _take_turn(everyone: Group, worker: DiffusionWorker, turn: Turn) -> None:
    for message in turn.messages:
        if isinstance(message, Control):
            _control(everyone, worker, message)
        else:
            take(worker, message)
    _same_jobs(worker, turn.jobs)
    if turn.unit:
        worker.steps.run(_unit(worker, turn))


def _control(everyone: Group, worker: DiffusionWorker, message: Control) -> None:
    answer: Payload = {}
    error: Exception | None = None
    try:
        answer = worker.control(message.action, message.payload)
    except CannotGoOnError:
        raise
    except Exception as caught:
        error = caught
    agree(everyone, error, ready=bool(answer.get("ready", True)))


def _same_jobs(worker: DiffusionWorker, jobs: list[str]) -> None:
    """Jobs that are done on the first rank are done."""
    own = [job.id for job in worker.steps.jobs()]
    for job_id in own:
        if job_id not in jobs:
            worker.steps.drop(job_id)
    if missing := set(jobs) - set(own):
        raise CannotGoOnError(f"this rank does not have the jobs {sorted(missing)}")


def _unit(worker: DiffusionWorker, turn: Turn) -> Unit:
    """The unit of the turn; the jobs are those of the first rank, and so must be their state."""
    if turn.unit == "encode":
        job = worker.steps.job(turn.job)
        if job is None or job.encoded:
            raise CannotGoOnError(f"job {turn.job} is not to be encoded here")
        return Encode(job)
    if turn.unit == "decode":
        job = worker.steps.job(turn.job)
        if job is None or not job.to_decode:
            raise CannotGoOnError(f"job {turn.job} is not to be decoded here")
        return Decode(job)
    rows = []
    for job_id, place in turn.rows:
        job = worker.steps.job(job_id)
        if job is None or not job.encoded or job.rows[place].denoised:
            raise CannotGoOnError(f"row {place} of job {job_id} is not to be denoised here")
        rows.append(job.rows[place])
    return worker.steps.batch(rows)
