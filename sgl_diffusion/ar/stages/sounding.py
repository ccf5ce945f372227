"""The fifth stage: codes to sound."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.loading import load_vocoder
from sgl_diffusion.ar.sampling import broken_numbers
from sgl_diffusion.ar.stages.part import WARM_UP, Part, tensors
from sgl_diffusion.ar.vocoder import SAMPLE_RATE, Piece, SoundStream
from sgl_diffusion.orchestrator.messages import Payload


@dataclass(eq=False)
class _Job:
    """`left` counts the answers that are not over; their sound is kept here unless it is
    streamed."""

    left: int
    stream: bool
    streams: dict[int, SoundStream] = field(default_factory=dict)
    sounds: dict[int, list[Tensor]] = field(default_factory=dict)
    frames: int = 0


class Sounding(Part):
    def load(self) -> Payload:
        self._jobs: dict[str, _Job] = {}
        self._waiting: deque[tuple[str, Payload, Tensor]] = deque()
        self._vocoder = load_vocoder(self.setting, self.outbox.loading)
        return {} if self._vocoder is None else {"sample_rate": SAMPLE_RATE}

    def warm_up(self) -> None:
        if self._vocoder is None:
            return
        told = {"row": 0, "rows": 1, "stream": False, "seed": 0, "reason": "stop"}
        voice = self._vocoder.voices[0]
        self.feed(WARM_UP, {**told, "voice": voice}, [torch.zeros(self._vocoder.groups, 2).long()])
        while self.step():
            pass

    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None:
        self._jobs.setdefault(job_id, _Job(meta["rows"], meta["stream"]))
        (codes,) = tensors(arrays, self.setting.device)
        self._waiting.append((job_id, meta, codes))

    def cancel(self, job_id: str) -> None:
        if self._jobs.pop(job_id, None) is not None:
            self._waiting = deque(item for item in self._waiting if item[0] != job_id)

    def step(self) -> bool:
        """Decode what waits of different answers, as much as goes together."""
        if not self._waiting:
            return False
        batch = self._next()
        try:
            sounds = self._decode(batch)
        except Exception as error:
            for job_id, _, _ in batch:
                if job_id in self._jobs:
                    self.fail(job_id, error)
            return True
        for (job_id, meta, codes), samples in zip(batch, sounds, strict=True):
            if job_id not in self._jobs:
                continue  # it failed with another answer
            if bool(samples.isfinite().all()):
                self._give(job_id, self._jobs[job_id], meta, codes.shape[1], samples)
            else:
                self.fail(job_id, broken_numbers())
        return True

    def running(self) -> int:
        return len(self._jobs)

    def _next(self) -> list[tuple[str, Payload, Tensor]]:
        """The first piece of each answer, in the order in which they came."""
        most = 1 if self._vocoder is None else self._vocoder.together
        batch: list[tuple[str, Payload, Tensor]] = []
        rest: deque[tuple[str, Payload, Tensor]] = deque()
        taken = set()
        for item in self._waiting:
            answer = (item[0], item[1]["row"])
            if answer in taken or len(batch) == most:
                rest.append(item)
            else:
                batch.append(item)
            taken.add(answer)
        self._waiting = rest
        return batch

    def _decode(self, batch: list[tuple[str, Payload, Tensor]]) -> list[Tensor]:
        assert self._vocoder is not None, "nobody speaks here"
        sounds = [torch.zeros(0)] * len(batch)
        pieces: dict[int, Piece] = {}
        for index, (job_id, meta, codes) in enumerate(batch):
            streams, row = self._jobs[job_id].streams, meta["row"]
            if row not in streams and codes.shape[1]:
                streams[row] = self._vocoder.stream(meta["voice"], meta["seed"])
            if row in streams:
                pieces[index] = (streams[row], codes, meta["reason"] is not None)
        decoded = self._vocoder.decode(list(pieces.values()))
        for index, samples in zip(pieces, decoded, strict=True):
            sounds[index] = samples
        return sounds

    def _give(self, job_id: str, job: _Job, meta: Payload, frames: int, samples: Tensor) -> None:
        index, reason = meta["row"], meta["reason"]
        job.frames += frames
        if not job.stream:
            job.sounds.setdefault(index, []).append(samples)
        elif len(samples) or reason is not None:
            part = {"index": index, "finish_reason": reason}
            self.outbox.output(job_id, {"sound": part}, [samples], final=False)
        if reason is not None:
            job.left -= 1
            if not job.left:
                del self._jobs[job_id]
                sounds = [torch.cat(job.sounds[row]) for row in sorted(job.sounds)]
                self.outbox.output(job_id, {"frames": job.frames}, sounds)
