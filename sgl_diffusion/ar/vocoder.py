"""What every decoder of codes does: sound comes in pieces, and the pieces are the whole."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

SAMPLE_RATE = 24_000


class SoundStream(Protocol):
    """The sound of one answer."""

    def add(self, codes: Tensor, *, last: bool = False) -> Tensor:
        """`codes` are [groups, frames], with `last` the last ones; returns new samples in [-1, 1],
        fp32 on the CPU."""


class Vocoder(Protocol):
    groups: int
    voices: tuple[str, ...]

    def stream(self, voice: str, seed: int) -> SoundStream:
        """`seed` is for what is drawn in decoding."""
