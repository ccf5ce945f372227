"""How long a part of the training takes, and how fast it learns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


class Steps:
    """`count` steps; the learning rate rises, stays, and falls to zero at the end.

    Counted, not timed: a busy machine takes longer and learns the same.
    """

    def __init__(self, name: str, count: int, note: Callable[[str], None]) -> None:
        self._name, self._count, self._note = name, count, note
        self._taken, self._began = 0, time.monotonic()
        self._losses: list[float] = []

    @property
    def over(self) -> bool:
        return self._taken >= self._count

    def share(self, *, warm: float, fall: float = 0.5) -> float:
        """Of the full learning rate."""
        done = self._taken / self._count
        return min(1.0, (done + 1e-3) / warm, (1 - done) / fall)

    def took(self, loss: torch.Tensor) -> None:
        """One more is done; now and then it says how it goes."""
        self._taken += 1
        self._losses.append(loss.item())
        if self._taken % max(1, self._count // 100) == 0 or self.over:
            minutes = (time.monotonic() - self._began) / 60
            mean = sum(self._losses) / len(self._losses)
            self._losses.clear()
            self._note(
                f"{self._name}: step {self._taken} of {self._count}, {minutes:.1f} minutes, "
                f"loss {mean:.4f}"
            )


def autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16)
