"""The second stage: media to vectors for the thinker. The question follows its media."""

from __future__ import annotations

from collections import deque
from typing import Any

from sgl_diffusion.ar.senses import Sensed, medium_of
from sgl_diffusion.ar.stages.part import THINKER, Part, Setting, tensors
from sgl_diffusion.ar.thinker import load_towers
from sgl_diffusion.ar.towers import Towers
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import GraphOutbox


class Encoders(Part):
    def __init__(self, setting: Setting, outbox: GraphOutbox) -> None:
        super().__init__(setting, outbox)
        self._model: Any | None = None

    def share(self, model: Any) -> None:
        """Take the towers of the thinker that is in this process."""
        self._model = model

    def load(self) -> Payload:
        self._waiting: deque[tuple[str, Payload, list[Any]]] = deque()
        if self._model is None:
            self.outbox.loading("loading the towers")
            setting = self.setting
            self._model = load_towers(setting.folder, dtype=setting.dtype, device=setting.device)
        self._towers = Towers(self._model, self.setting.limits.media_bytes)
        return {}

    def warm_up(self) -> None:
        """A picture and a sound of the first request find libraries that others have warmed."""

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        self._waiting.append((job_id, meta, arrays))

    def cancel(self, job_id: str) -> None:
        self._waiting = deque(item for item in self._waiting if item[0] != job_id)

    def step(self) -> bool:
        if not self._waiting:
            return False
        job_id, meta, arrays = self._waiting.popleft()
        try:
            self._take(job_id, meta, arrays)
        except Exception as error:
            self.fail(job_id, error)
        return True

    def running(self) -> int:
        return len({item[0] for item in self._waiting})

    def metrics(self) -> list[Metric]:
        return [Metric(name="media_reused_total", value=self._towers.reused)]

    def _take(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        if "medium" not in meta:
            self.outbox.hand_on(job_id, THINKER, meta, arrays)
            self.outbox.output(job_id, {}, [])
            return
        (features,) = tensors(arrays, self.setting.device)
        felt = self._towers.feel(Sensed(**medium_of(meta["medium"]).told(), features=features))
        self.outbox.hand_on(job_id, THINKER, meta, [felt.vectors, *felt.deep])
