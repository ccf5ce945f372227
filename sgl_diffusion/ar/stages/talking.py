"""The fourth stage: words to codes of sound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from sgl_diffusion.ar.loading import load_talker
from sgl_diffusion.ar.speech import SpeechBatch, SpeechRow
from sgl_diffusion.ar.stages.part import CODE2WAV, WARM_UP, Part, tensors
from sgl_diffusion.base.chat import Speech
from sgl_diffusion.orchestrator.messages import Metric, Payload


@dataclass(eq=False)
class _Job:
    """`left` counts the answers of which sound or text is still to come; `told` goes with every
    piece."""

    left: int
    told: Payload
    rows: dict[int, SpeechRow] = field(default_factory=dict)


class Talking(Part):
    def load(self) -> Payload:
        self._jobs: dict[str, _Job] = {}
        self._of: dict[SpeechRow, tuple[str, Payload]] = {}
        self.batch: SpeechBatch | None = None
        loaded = load_talker(self.setting, self.outbox.loading)
        if loaded is None:
            return {}
        self.talker, self._voices = loaded
        self.batch = SpeechBatch(self.talker, self._codes, self._failed)
        return {"voices": self._voices}

    def warm_up(self) -> None:
        if self.batch is None:
            return
        trial = self.talker.trial()
        manner = {"voice": self._voices[0], "max_frames": 2}
        opening = {"shift": 0, "manner": manner, "seed": 0}
        told = {"row": 0, "rows": 1, "stream": False, "characters": 1, "ended": True}
        self.feed(WARM_UP, {**told, "opening": opening, "arrays": len(trial)}, trial)
        while self.step():
            pass
        self.batch.steps.clear()

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        shared = {"rows": meta["rows"], "stream": meta["stream"]}
        job = self._jobs.setdefault(job_id, _Job(meta["rows"], shared))
        try:
            self._hear(job_id, job, meta, tensors(arrays, self.setting.device))
        except Exception as error:
            self.fail(job_id, error)

    def cancel(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        if job is not None and self.batch is not None:
            for row in job.rows.values():
                self.batch.drop(row)
                self._of.pop(row, None)

    def step(self) -> bool:
        return self.batch is not None and self.batch.step()

    def running(self) -> int:
        return len(self._jobs)

    def metrics(self) -> list[Metric]:
        if self.batch is None:
            return []
        return [
            Metric(name="talker_steps_total", value=count, labels={"rows": str(rows)})
            for rows, count in sorted(self.batch.steps.items())
        ]

    # -- inside -----------------------------------------------------------------------------------

    def _hear(self, job_id: str, job: _Job, meta: Payload, arrays: list[Tensor]) -> None:
        """How an answer is said, and its next words."""
        assert self.batch is not None, "nobody speaks here"
        index, opening = meta["row"], meta.get("opening")
        if opening is not None:
            told, arrays = arrays[: meta["arrays"]], arrays[meta["arrays"] :]
            wish = msgspec.convert(opening["manner"], Speech)
            row = job.rows[index] = SpeechRow(
                self.talker.opening(told, opening["shift"], wish.voice),
                opening["seed"],
                self.talker.usual.of(wish),
            )
            self._of[row] = (job_id, {"row": index, "voice": wish.voice, "seed": opening["seed"]})
            self.batch.add(row)
        spoken = job.rows.get(index)
        if spoken is None:
            if meta["ended"]:  # not one word was written
                nothing = {**job.told, "row": index, "voice": "", "seed": 0, "reason": "stop"}
                self.outbox.hand_on(job_id, CODE2WAV, nothing, [torch.zeros(1, 0).long()])
                self._over(job_id, job)
            return
        if arrays:
            spoken.tell(self.talker.words(torch.stack(arrays)), 0)
        spoken.characters = meta["characters"]
        spoken.told_all = meta["ended"]
        if spoken.told_all and spoken.finish_reason is not None:
            self._over(job_id, job)

    def _codes(self, row: SpeechRow, codes: Tensor) -> None:
        job_id, told = self._of[row]
        job, reason = self._jobs[job_id], row.finish_reason
        self.outbox.hand_on(job_id, CODE2WAV, {**job.told, **told, "reason": reason}, [codes])
        if reason is not None:
            if row.told_all:
                self._over(job_id, job)
            self._of.pop(row, None)

    def _failed(self, row: SpeechRow, error: Exception) -> None:
        self.fail(self._of[row][0], error)

    def _over(self, job_id: str, job: _Job) -> None:
        """One answer has been spoken, and no word of it comes any more."""
        job.left -= 1
        if not job.left:
            del self._jobs[job_id]
            self.outbox.output(job_id, {}, [])
