"""How long a part of the training takes, and how fast it learns: by the clock, or by steps."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch


class Clock:
    """Training for some minutes; the learning rate rises, stays, and falls to zero at the end."""

    def __init__(self, minutes: float, device: torch.device) -> None:
        self.device = device
        self._minutes, self._began = minutes, time.monotonic()

    @property
    def done(self) -> float:
        return min((time.monotonic() - self._began) / 60 / self._minutes, 1.0)

    @property
    def over(self) -> bool:
        return self.done >= 1.0

    def rate(self, most: float, *, warm: float, fall: float = 0.5) -> float:
        done = self.done
        return most * min(1.0, (done + 1e-3) / warm, (1 - done) / fall)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16)
