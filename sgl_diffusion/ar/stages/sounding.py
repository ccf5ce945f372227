"""The fifth stage: codes to sound."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.loading import load_vocoder
from sgl_diffusion.ar.stages.part import WARM_UP, Part, tensors
from sgl_diffusion.ar.vocoder import SAMPLE_RATE, SoundStream
from sgl_diffusion.orchestrator.messages import Payload

# In this time, in seconds, a talker in the same process makes a few frames.
_STEP = 0.05


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
        """Decode what waits, as far as one step's time goes."""
        if not self._waiting:
            return False
        until = time.monotonic() + _STEP
        while self._waiting:
            job_id, meta, codes = self._waiting.popleft()
            try:
                self._decode(job_id, self._jobs[job_id], meta, codes)
            except Exception as error:
                self.fail(job_id, error)
            if time.monotonic() >= until:
                break
        return True

    def running(self) -> int:
        return len(self._jobs)

    def _decode(self, job_id: str, job: _Job, meta: Payload, codes: Tensor) -> None:
        assert self._vocoder is not None, "nobody speaks here"
        index, reason = meta["row"], meta["reason"]
        stream = job.streams.get(index)
        if stream is None and codes.shape[1]:
            stream = self._vocoder.stream(meta["voice"], meta["seed"])
            job.streams[index] = stream
        samples = torch.zeros(0)
        if stream is not None:
            samples = stream.add(codes, last=reason is not None)
        job.frames += codes.shape[1]
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
