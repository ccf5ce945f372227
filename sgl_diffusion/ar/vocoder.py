"""What every decoder of codes does: sound comes in pieces, and the pieces are the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

SAMPLE_RATE = 24_000


class SoundStream(Protocol):
    """The sound of one answer."""

    def add(self, codes: Tensor, *, last: bool = False) -> Tensor:
        """`codes` are [groups, frames], with `last` the last ones; returns new samples in [-1, 1],
        fp32 on the CPU."""


# A piece of an answer: its stream, new codes, whether they are the last.
Piece = tuple[SoundStream, Tensor, bool]


class Vocoder(Protocol):
    """`together` is how many pieces one step decodes at most."""

    groups: int
    together: int
    voices: tuple[str, ...]

    def decode(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """New samples of each of different streams."""

    def stream(self, voice: str, seed: int) -> SoundStream:
        """`seed` is for what is drawn in decoding."""
