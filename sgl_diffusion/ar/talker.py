"""What every talker does: a row begins with an opening, then each step makes one frame of codes of
every row that speaks, and takes its next word, or what stands for none.

Words are vectors of the thinker's width, as `ar/tellers.py` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from sgl_diffusion.ar.kv import KvSlab, Slot
from sgl_diffusion.base.chat import Speech

# Draws the code of one group of one row: (row, group, logits).
DrawCode = Callable[[int, int, Tensor], int]


@dataclass(frozen=True, eq=False)
class Opening:
    """What a speech begins with: [L, width] with positions [3, L], by how much later positions
    differ from the index, and the vector that stands for no word."""

    vectors: Tensor
    positions: Tensor
    shift: int
    silence: Tensor


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How the codes of a speech are drawn; at temperature 0 the most likely ones are taken."""

    temperature: float = 0.9
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_frames: int = 4096

    def of(self, wish: Speech) -> Manner:
        """With what is wished for in place of what is usual."""
        names = [each.name for each in fields(self)]
        told = {name: getattr(wish, name) for name in names}
        return replace(self, **{name: value for name, value in told.items() if value is not None})


class Talker(Protocol):
    """A frame has `groups` codes. One of `ends` ends a speech; `seen` counts as said before it
    begins. `pace` is how many frames of it are as long as one of Qwen3's, `usual` how it is used to
    draw."""

    kv: KvSlab
    groups: int
    ends: frozenset[int]
    seen: tuple[int, ...]
    pace: int
    usual: Manner

    def words(self, vectors: Tensor) -> Tensor:
        """[n, width of the thinker] as `decode` takes them."""

    def opening(self, arrays: Sequence[Tensor], shift: int, voice: str) -> Opening:
        """From what the family's teller tells."""

    def trial(self) -> list[Tensor]:
        """An opening of zeros."""

    def prefill(self, slot: Slot, opening: Opening) -> tuple[Tensor, Tensor]:
        """Returns the logits of code 0, fp32 on the CPU, and the state that they come from."""

    def frames(
        self, states: Tensor, firsts: Sequence[int], draw: DrawCode
    ) -> tuple[Tensor, Tensor]:
        """The other codes of a frame, from [rows, width] and the codes 0: [rows, groups] and the
        sum of their vectors, [rows, width]."""

    def decode(
        self, vectors: Tensor, positions: Tensor, writing: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """One step of every row in the slab: vectors [rows, width], positions [rows]. Returns
        logits of code 0, fp32 on the CPU, and states."""


def less_of_the_same(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Logits with those of codes that were drawn before made smaller."""
    if not history or penalty == 1.0:
        return logits
    seen = torch.tensor(sorted(set(history)))
    scores = logits[seen]
    changed = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.scatter(0, seen, changed)
