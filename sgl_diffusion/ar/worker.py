"""Stages of an omni model in one process, all of them or some: what the stage process drives.

Stages hand things on to each other within the process as they are; what is for a stage elsewhere
goes through the orchestrator, wrapped, as that knows of processes and not of what is in them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sgl_diffusion.ar.stages.encoders import Encoders
from sgl_diffusion.ar.stages.part import (
    CODE2WAV,
    ENCODERS,
    PREPROCESS,
    STAGES,
    TALKER,
    THINKER,
    WARM_UP,
    Part,
    Setting,
    portable,
)
from sgl_diffusion.ar.stages.preprocess import Preprocess
from sgl_diffusion.ar.stages.sounding import Sounding
from sgl_diffusion.ar.stages.talking import Talking
from sgl_diffusion.ar.stages.thinking import Thinking
from sgl_diffusion.ar.thinker import drop_towers
from sgl_diffusion.base.errors import RequestError, SglError
from sgl_diffusion.base.startup import spent_on
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.parts import Parts
from sgl_diffusion.orchestrator.stage import GraphOutbox

_KINDS: dict[str, type[Part]] = {
    PREPROCESS: Preprocess,
    ENCODERS: Encoders,
    THINKER: Thinking,
    TALKER: Talking,
    CODE2WAV: Sounding,
}


class ChatWorker:
    """Implements `orchestrator.stage.Downstream`. `elsewhere` says which process has the stages
    that this one has not."""

    def __init__(
        self,
        setting: Setting,
        outbox: GraphOutbox,
        *,
        stages: Collection[str] = STAGES,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        self._outbox = outbox
        self._elsewhere = elsewhere or {}
        self._device = setting.device
        self._jobs: dict[str, Parts] = {}
        self.parts = {
            name: _KINDS[name](setting, _Inner(self, name)) for name in STAGES if name in stages
        }

    def load(self) -> Payload:
        card: Payload = {"device": self._device.type}  # by which a long silence is judged
        for name in sorted(self.parts, key=lambda name: name != THINKER):
            part, thinker = self.parts[name], self.parts.get(THINKER)
            if isinstance(part, Encoders) and isinstance(thinker, Thinking):
                part.share(thinker.model)
            card |= part.load()
            if isinstance(part, Thinking) and ENCODERS not in self.parts:
                drop_towers(part.model)
        self._outbox.loading("warming up")
        with spent_on("warm-up"):
            for part in self.parts.values():
                part.warm_up()
        return card

    def submit(self, job_id: str, payload: Payload) -> None:
        first = self.parts[PREPROCESS]
        assert isinstance(first, Preprocess)
        self._jobs[job_id] = Parts(PREPROCESS)
        first.submit(job_id, payload)

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        self._deliver(job_id, meta["stage"], meta["told"], arrays)

    def cancel(self, job_id: str) -> None:
        if self._jobs.pop(job_id, None) is not None:
            for part in self.parts.values():
                part.cancel(job_id)

    def control(self, action: str, payload: Payload) -> Payload:
        raise RequestError(f"This worker has no control action {action!r}.", code="not_supported")

    def step(self) -> bool:
        """One unit of every stage that has something to do."""
        did = [part.step() for part in self.parts.values()]
        return any(did)

    def running(self) -> int:
        return len(self._jobs)

    def metrics(self) -> list[Metric]:
        return [metric for part in self.parts.values() for metric in part.metrics()]

    # -- from the stages --------------------------------------------------------------------------

    def handed_on(self, job_id: str, stage: str, told: Payload, arrays: list[Any]) -> None:
        if job_id == WARM_UP:
            return
        if stage in self.parts:
            self._deliver(job_id, stage, told, arrays)
        else:
            wrapped = {"stage": stage, "told": told}
            self._outbox.hand_on(job_id, self._elsewhere[stage], wrapped, portable(arrays))

    def put_out(
        self, job_id: str, name: str, meta: Payload, arrays: list[Any], final: bool
    ) -> None:
        if job_id == WARM_UP:
            return
        if not final:
            self._outbox.output(job_id, meta, portable(arrays), final=False)
            return
        parts = self._jobs[job_id]
        if parts.ended(name, meta, arrays):
            del self._jobs[job_id]
            self._outbox.output(job_id, parts.meta, portable(parts.arrays))

    def failed(self, job_id: str, error: SglError) -> None:
        self.cancel(job_id)
        self._outbox.failed(job_id, error)

    def loading(self, note: str) -> None:
        self._outbox.loading(note)

    def progress(self, job_id: str, step: int, total: int, phase: str) -> None:
        if job_id != WARM_UP:
            self._outbox.progress(job_id, step, total, phase)

    def poll(self) -> None:
        self._outbox.poll()

    def _deliver(self, job_id: str, stage: str, told: Payload, arrays: list[Any]) -> None:
        if job_id in self._jobs:
            self._jobs[job_id].sent(stage)
        else:
            self._jobs[job_id] = Parts(stage)
        self.parts[stage].feed(job_id, told, arrays)


class _Inner:
    """The outbox of one stage; implements `GraphOutbox`."""

    def __init__(self, worker: ChatWorker, name: str) -> None:
        self._worker = worker
        self._name = name
        self.loading = worker.loading
        self.progress = worker.progress
        self.failed = worker.failed
        self.poll = worker.poll
        self.hand_on = worker.handed_on

    def output(self, job_id: str, meta: Payload, arrays: list[Any], *, final: bool = True) -> None:
        self._worker.put_out(job_id, self._name, meta, arrays, final)
