"""A BigVGAN over a spectrum that comes in pieces: the samples are those of the whole.

It looks a fixed number of frames to both sides, so a piece is decoded with that many frames before
it, and its last frames wait for those behind them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Each activation goes through filters of twelve taps at twice the rate, there and back.
_ACTIVATION = 6
_EDGE = 3  # convolutions of seven taps, at both ends


def reach(config: Any) -> int:
    """How many frames to either side a sample depends on."""
    rate, frames = 1, float(_EDGE)
    kinds = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
    widest = max(
        sum(2 * _ACTIVATION + (kernel - 1) // 2 * (1 + dilation) for dilation in dilations)
        for kernel, dilations in kinds
    )
    for factor in config.upsample_rates:
        frames += 2 / rate
        rate *= factor
        frames += widest / rate
    return math.ceil(frames + (_ACTIVATION + _EDGE) / rate) + 1


class Waves:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.reach = reach(model.config)
        self.samples_per_frame = math.prod(model.config.upsample_rates)

    def stream(self) -> WaveStream:
        return WaveStream(self)


class WaveStream:
    def __init__(self, waves: Waves) -> None:
        self._waves = waves
        self._frames: Tensor | None = None
        self._first = 0  # of the frames that are kept
        self._done = 0

    @torch.inference_mode()
    def add(self, frames: Tensor, *, last: bool = False) -> Tensor:
        """`frames` are [n, mels]; returns new samples in [-1, 1], fp32 on the CPU."""
        waves = self._waves
        here = frames if self._frames is None else torch.cat([self._frames, frames])
        end = self._first + len(here)
        if not last:
            end = max(end - waves.reach, self._done)
        samples = torch.zeros(0)
        if end > self._done:
            sound = waves.model(here.T[None]).float().reshape(-1)
            per = waves.samples_per_frame
            samples = sound[(self._done - self._first) * per : (end - self._first) * per]
        keep = max(end - waves.reach, 0)
        self._frames, self._first, self._done = here[keep - self._first :], keep, end
        return samples
