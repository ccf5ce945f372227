"""What a stage does all day: take in messages, let the worker do a step, report.

The loop is the worker's `Outbox` too. It knows which jobs are unfinished, so that a worker that
fails unexpectedly still leaves an answer for each of them.
"""

from __future__ import annotations

import errno
import importlib
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.base.errors import OutOfMemoryError, SglError, to_wire
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.startup import measuring, spent_on
from sgl_diffusion.orchestrator import relay
from sgl_diffusion.orchestrator.channel import Channel, Fed, Received
from sgl_diffusion.orchestrator.frames import ChannelError
from sgl_diffusion.orchestrator.messages import (
    Boot,
    Cancel,
    Control,
    ControlDone,
    Credit,
    Dropped,
    Failed,
    Heartbeat,
    Loading,
    Metric,
    Output,
    Payload,
    Progress,
    Ready,
    Shutdown,
    Submit,
)
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Downstream, Worker, WorkerFactory

log = get_logger(__name__)


def await_boot(channel: Channel) -> tuple[Boot, list[Received]]:
    """The first message of a channel, and what came right behind it."""
    received: list[Received] = []
    while not received:
        received = channel.receive(60.0)
    boot, *early = received
    if not isinstance(boot, Boot):
        raise ChannelError(f"a {type(boot).__name__} before the Boot")
    return boot, early


class StageLoop:
    """Runs one worker from its load to its end; also the `stage.Outbox` that the worker gets."""

    def __init__(self, channel: Channel, boot: Boot, early: Iterable[Received] = ()) -> None:
        self._channel = channel
        self._boot = boot
        self._worker: Worker | None = None
        self._jobs: Counter[str] = Counter()  # how many messages came about each
        self._dropped: list[str] = []
        self._outputs: deque[tuple[Output, list[NDArray[Any]]]] = deque()
        self._credits = boot.credits
        self._later = deque(early)
        self._busy = False
        self._beat_at = time.monotonic()
        self._leave_at: float | None = None
        self._start: list[Metric] = []

    def run(self) -> int:
        """The exit status: 0 if the coordinator asked the stage to leave."""
        try:
            worker = self._load()
            if worker is None:
                return 1
            while not self._leaving():
                self._turn(worker)
            return 0
        except ChannelError as error:
            log.warning("stage %s ends: %s", self._boot.stage, error)
            return 1
        except Exception:
            log.exception("stage %s ends: the worker cannot go on", self._boot.stage)
            return 1
        finally:
            self._channel.finish(1.0)

    # -- the worker's outbox ----------------------------------------------------------------------

    def loading(self, note: str) -> None:
        self._channel.send(Loading(note))

    def progress(self, job_id: str, step: int, total: int, phase: str) -> None:
        if job_id in self._jobs:
            self._channel.send(Progress(job_id, step, total, phase), advisory=True)

    def output(self, job_id: str, meta: Payload, arrays: list[Any], *, final: bool = True) -> None:
        self._put(job_id, meta, arrays, final=final)
        if final:
            self._jobs.pop(job_id, None)

    def hand_on(self, job_id: str, stage: str, meta: Payload, arrays: list[Any]) -> None:
        self._put(job_id, meta, arrays, final=False, to=stage)

    def failed(self, job_id: str, error: SglError) -> None:
        if job_id in self._jobs:
            self._forget(job_id)
            self._channel.send(Failed(to_wire(error), job_id))

    def poll(self) -> None:
        for message in self._channel.receive(0.0):
            # Whatever must not happen inside a step keeps its place in the order of arrival.
            urgent = isinstance(message, Cancel | Credit)
            if self._worker is not None and (
                urgent or (isinstance(message, Submit | Fed) and not self._later)
            ):
                self._take(self._worker, message)
            else:
                self._later.append(message)
        self._report()

    # -- the loop ---------------------------------------------------------------------------------

    def _put(
        self, job_id: str, meta: Payload, arrays: list[Any], *, final: bool, to: str = ""
    ) -> None:
        if job_id in self._jobs:
            views = [np.asarray(values) for values in arrays]
            message = Output(
                job_id, meta, relay.describe(views), final, to, self._jobs[job_id] if final else 0
            )
            self._outputs.append((message, views))

    def _load(self) -> Worker | None:
        try:
            with measuring() as spent:
                with spent_on("imports"):
                    worker = _factory(self._boot.entry)(self._boot.config, self)
                card = worker.load()
        except ChannelError:
            raise
        except Exception as error:
            if not isinstance(error, SglError):
                log.exception("stage %s cannot start", self._boot.stage)
            self._channel.send(Failed(to_wire(error)))
            return None
        self._worker = worker
        self._start = [
            Metric("worker_start_seconds", seconds, {"on": name}, "gauge")
            for name, seconds in spent.items()
        ]
        self._channel.send(Ready(card, sum(spent.values()), spent))
        return worker

    def _turn(self, worker: Worker) -> None:
        while self._later:
            self._take(worker, self._later.popleft())
        for message in self._channel.receive(0.0 if self._busy else self._until_beat()):
            self._take(worker, message)
        # A job that is cancelled within a step is let go of at its end.
        while self._dropped:
            self._channel.send(Dropped(self._dropped.pop()))
        self._busy = self._step(worker)
        self._report()

    def _take(self, worker: Worker, message: Received) -> None:
        match message:
            case Submit(job_id, payload):
                self._jobs[job_id] += 1
                worker.submit(job_id, payload)
            case Fed(job_id, meta, arrays):
                assert isinstance(worker, Downstream), "the app feeds a stage that takes nothing"
                self._jobs[job_id] += 1
                worker.feed(job_id, meta, arrays)
            case Cancel(job_id):
                self._forget(job_id)
                worker.cancel(job_id)
                self._dropped.append(job_id)
            case Control(control_id, action, payload):
                self._channel.send(_control(worker, control_id, action, payload))
            case Credit(count):
                self._credits += count
            case Shutdown(drain_seconds):
                self._leave_at = time.monotonic() + drain_seconds
            case _:
                raise ChannelError(f"a {type(message).__name__} at the wrong time")

    def _step(self, worker: Worker) -> bool:
        try:
            return worker.step()
        except (ChannelError, CannotGoOnError):
            raise
        except Exception as error:
            if not self._jobs:
                raise
            log.exception("a step failed; %d jobs end", len(self._jobs))
            for job_id in list(self._jobs):
                worker.cancel(job_id)
                self._forget(job_id)
                self._channel.send(Failed(to_wire(error), job_id))
            return True

    def _report(self) -> None:
        """Send outputs as far as credits reach, and a heartbeat if one is due. Those without arrays
        cost no credit.

        The heartbeat goes before a result: whoever holds that finds it in the metrics.
        """
        told = self._until_beat() <= 0
        if told:
            self._beat()
        while self._outputs and (self._credits or not self._outputs[0][1]):
            message, arrays = self._outputs.popleft()
            if message.final and not told:
                told = True
                self._beat()
            try:
                self._channel.send(message, arrays)
                self._credits -= bool(arrays)
            except ChannelError:
                raise
            except Exception as error:
                log.exception("the output of job %s cannot be sent", message.job_id)
                self._forget(message.job_id)
                self._channel.send(Failed(to_wire(_explain(error)), message.job_id))

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        worker = self._worker
        samples = [*worker.metrics(), *self._start] if worker is not None else []
        running = worker.running() if worker is not None else 0
        self._channel.send(Heartbeat(samples, running), advisory=True)

    def _until_beat(self) -> float:
        # Steps may be much shorter than an interesting time.
        every = self._boot.heartbeat / 10 if self._busy else self._boot.heartbeat
        return max(self._beat_at + every - time.monotonic(), 0.0)

    def _leaving(self) -> bool:
        if self._leave_at is None:
            return False
        return not (self._jobs or self._outputs) or time.monotonic() >= self._leave_at

    def _forget(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        self._outputs = deque(item for item in self._outputs if item[0].job_id != job_id)


def _factory(entry: str) -> WorkerFactory:
    module, _, name = entry.partition(":")
    factory: WorkerFactory = getattr(importlib.import_module(module), name)
    return factory


def _control(worker: Worker, control_id: str, action: str, payload: Payload) -> ControlDone:
    try:
        return ControlDone(control_id, worker.control(action, payload))
    except (ChannelError, CannotGoOnError):
        raise
    except Exception as error:
        if not isinstance(error, SglError):
            log.exception("control action %s failed", action)
        return ControlDone(control_id, {}, to_wire(error))


def _explain(error: Exception) -> Exception:
    full = isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)
    if full or isinstance(error, MemoryError):
        return OutOfMemoryError(
            "The result does not fit into shared memory.",
            hint="Ask for less at once, or give the server more memory.",
        )
    return error
