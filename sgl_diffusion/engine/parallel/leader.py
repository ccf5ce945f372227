"""The first rank of a worker: it speaks with the coordinator and decides for all ranks.

Messages from outside are kept until the next unit of work and told to every rank together with it,
so all ranks have the same jobs at every step. Whatever goes wrong among the ranks ends this
process, and the others with it; the supervisor starts them anew and the jobs run again.
"""

from __future__ import annotations

from collections.abc import Callable

from sgl_diffusion.base.errors import ConfigError, from_wire
from sgl_diffusion.distributed.group import Group, RankLostError
from sgl_diffusion.engine.lineup import Batch, Decode, Encode, Unit
from sgl_diffusion.engine.parallel.agreement import agree, together
from sgl_diffusion.engine.parallel.turn import Turn, encode_turn
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.orchestrator.frames import ChannelError
from sgl_diffusion.orchestrator.messages import Cancel, Control, Metric, Payload, Submit
from sgl_diffusion.orchestrator.stage import CannotGoOnError

PREPARE = "lora_prepare"  # changes nothing that runs; the ranks need not agree at once


class Leader:
    """Implements `orchestrator.stage.Worker` for all ranks; `meet` waits for them."""

    def __init__(
        self, meet: Callable[[], tuple[Group, DiffusionWorker]], *, nodes: int = 1
    ) -> None:
        self._meet = meet
        self._nodes = nodes
        self._waiting: list[Submit | Cancel] = []
        self._everyone: Group
        self._worker: DiffusionWorker

    def load(self) -> Payload:
        self._everyone, self._worker = self._meet()
        card = together(self._everyone, self._worker.load)
        if self._nodes > 1:  # pictures of requests are files of this machine
            if card["min_images"] > 0:
                raise ConfigError(
                    "A model that works on pictures runs on one machine only.",
                    hint="Leave --nnodes out.",
                    param="nnodes",
                )
            card = {**card, "max_images": 0}
        return card

    def submit(self, job_id: str, payload: Payload) -> None:
        self._waiting.append(Submit(job_id, payload))

    def cancel(self, job_id: str) -> None:
        self._waiting.append(Cancel(job_id))

    def running(self) -> int:
        submits = sum(isinstance(message, Submit) for message in self._waiting)
        return self._worker.running() + submits

    def metrics(self) -> list[Metric]:
        return self._worker.metrics()

    def control(self, action: str, payload: Payload) -> Payload:
        try:
            return self._control(action, payload)
        except RankLostError as error:
            raise CannotGoOnError("the ranks cannot go on") from error

    def _control(self, action: str, payload: Payload) -> Payload:
        messages = self._take()
        self._tell(Turn([*messages, Control("", action, payload)], self._jobs()))
        answer: Payload = {}
        error: Exception | None = None
        try:
            answer = self._worker.control(action, payload)
        except CannotGoOnError:
            raise
        except Exception as caught:
            error = caught
        outcomes = agree(self._everyone, error, ready=bool(answer.get("ready", True)))
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed and len(failed) < len(outcomes) and action != PREPARE:
            raise CannotGoOnError(f"{action} was done on some ranks only")
        if error is not None:
            raise error
        if failed and failed[0].error is not None:
            raise from_wire(failed[0].error)
        if "ready" in answer and not all(outcome.ready for outcome in outcomes):
            return {"ready": False}
        return answer

    def step(self) -> bool:
        messages = self._take()
        try:
            unit = self._worker.steps.choose()
            self._tell(self._turn(messages, unit))
            if unit is None:
                return False
            self._worker.steps.run(unit)
        except (ChannelError, CannotGoOnError):
            raise
        except Exception as error:
            raise CannotGoOnError("the ranks cannot go on") from error
        return True

    def _turn(self, messages: list[Submit | Cancel], unit: Unit | None) -> Turn:
        jobs = self._jobs()
        if isinstance(unit, Batch):
            rows = [(row.job.id, row.job.rows.index(row)) for row in unit.rows]
            return Turn([*messages], jobs, "denoise", rows=rows)
        if isinstance(unit, Encode):
            return Turn([*messages], jobs, "encode", job=unit.job.id)
        if isinstance(unit, Decode) and self._worker.steps.shares_decoding:
            return Turn([*messages], jobs, "decode", job=unit.job.id)
        return Turn([*messages], jobs)

    def _take(self) -> list[Submit | Cancel]:
        """Let this rank know what waited; returns it for the others."""
        messages, self._waiting = self._waiting, []
        for message in messages:
            take(self._worker, message)
        return messages

    def _jobs(self) -> list[str]:
        return [job.id for job in self._worker.steps.jobs()]

    def _tell(self, turn: Turn) -> None:
        self._everyone.broadcast(encode_turn(turn))


def take(worker: DiffusionWorker, message: Submit | Cancel) -> None:
    if isinstance(message, Submit):
        worker.submit(message.job_id, message.payload)
    else:
        worker.cancel(message.job_id)
