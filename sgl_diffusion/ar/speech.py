"""The answers that are being spoken: words come in while the thinker writes, codes go out.

A row waits where its next word is not written yet, and the others go on. When all words are in, it
goes on until the talker ends it, or until the cap.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sgl_diffusion.ar.kv import Slot
from sgl_diffusion.ar.sampling import Draw
from sgl_diffusion.ar.talker import Manner, Opening, Talker, less_of_the_same
from sgl_diffusion.base.chat import TextSampling

DETAILS = TextSampling(temperature=1.0, top_k=50, top_p=0.8)
# All are in frames of Qwen3, which are 80 ms.
# The first sound goes out after few; later ones come in pieces that cost less each.
FIRST_PIECE = 4
LARGEST_PIECE = 32
# Talkers run away on short texts. Slow speech takes a quarter of a second a character; this is
# twice as long, and four seconds for pauses.
FRAMES_PER_CHARACTER = 6
FRAMES_FREE = 50


@dataclass(eq=False)
class SpeechRow:
    """One spoken answer. `seed` gives its codes; `piece` frames make the next piece of sound."""

    opening: Opening
    seed: int
    manner: Manner
    piece: int = FIRST_PIECE
    words: deque[Tensor] = field(default_factory=deque)
    told_all: bool = False
    characters: int = 0
    slot: Slot | None = None
    logits: Tensor | None = None
    state: Tensor | None = None
    history: list[int] = field(default_factory=list)
    waiting: list[Tensor] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        manner = self.manner
        talking = TextSampling(
            temperature=manner.temperature, top_p=manner.top_p, top_k=manner.top_k
        )
        self.draw = Draw(talking, self.seed)
        self.detail = Draw(DETAILS if manner.temperature else talking, self.seed)

    def tell(self, words: Tensor, characters: int) -> None:
        """More words, [n, width], and how many characters they are."""
        self.words += list(words)
        self.characters += characters

    def too_long(self, pace: int) -> bool:
        if len(self.history) >= self.manner.max_frames:
            return True
        natural = pace * (FRAMES_FREE + FRAMES_PER_CHARACTER * self.characters)
        return self.told_all and len(self.history) >= natural


class SpeechBatch:
    """`on_codes` gets new codes of a row, [groups, frames]; its `finish_reason` is set with the
    last of them. Rows wait while as many speak as the talker has room for."""

    def __init__(self, talker: Talker, on_codes: Callable[[SpeechRow, Tensor], None]) -> None:
        self._talker = talker
        self._on_codes = on_codes
        self.waiting: deque[SpeechRow] = deque()
        self.rows: list[SpeechRow] = []
        self.steps: Counter[int] = Counter()

    def add(self, row: SpeechRow) -> None:
        self.waiting.append(row)

    def drop(self, row: SpeechRow) -> None:
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            assert row.slot is not None
            self._talker.kv.leave(row.slot)
            row.slot = None
            self.rows.remove(row)

    def step(self) -> bool:
        """One frame of every row whose next word is known."""
        began = self._begin()
        ready = [row for row in self.rows if row.words or row.told_all]
        speaking = [row for row in ready if self._first(row)]
        if speaking:
            self.steps[len(speaking)] += 1
            self._advance(speaking)
        return began or bool(ready)

    def _begin(self) -> bool:
        """Read one opening at most: the others go on speaking."""
        if not self.waiting or len(self.rows) == self._talker.kv.most:
            return False
        row = self.waiting.popleft()
        row.slot = self._talker.kv.take()
        row.logits, row.state = self._talker.prefill(row.slot, row.opening)
        self.rows.append(row)
        return True

    def _first(self, row: SpeechRow) -> bool:
        """Draw code 0 of the next frame; False where the speech ends instead."""
        assert row.logits is not None
        penalty = row.manner.repetition_penalty
        said = [*self._talker.seen, *row.history]
        code = row.draw(less_of_the_same(row.logits, said, penalty)).token
        if code in self._talker.ends:
            self._finish(row, "stop")
        elif row.too_long(self._talker.pace):
            self._finish(row, "length")
        else:
            row.history.append(code)
            return True
        return False

    def _advance(self, rows: list[SpeechRow]) -> None:
        states = [row.state for row in rows if row.state is not None]
        codes, vectors = self._talker.frames(
            torch.stack(states),
            [row.history[-1] for row in rows],
            lambda index, _, logits: rows[index].detail(logits).token,
        )
        slots = self._talker.kv.slots
        inputs = vectors.new_zeros(len(slots), vectors.shape[1])
        positions = torch.tensor([slot.length for slot in slots], device=vectors.device)
        writing = [False] * len(slots)
        for row, frame, vector in zip(rows, codes, vectors, strict=True):
            assert row.slot is not None
            at = row.slot.index
            inputs[at] = vector + (row.words.popleft() if row.words else row.opening.silence)
            positions[at] += row.opening.shift
            writing[at] = True
            row.waiting.append(frame)
        logits, fresh = self._talker.decode(inputs, positions, writing)
        for row in rows:
            assert row.slot is not None
            row.logits, row.state = logits[row.slot.index], fresh[row.slot.index]
            if len(row.waiting) >= row.piece * self._talker.pace:
                self._hand_over(row)

    def _finish(self, row: SpeechRow, reason: str) -> None:
        row.finish_reason = reason
        self.drop(row)
        self._hand_over(row)

    def _hand_over(self, row: SpeechRow) -> None:
        codes = torch.zeros(self._talker.groups, 0, dtype=torch.long)
        if row.waiting:
            codes = torch.stack(row.waiting, dim=1)
            row.waiting.clear()
            row.piece = min(2 * row.piece, LARGEST_PIECE)
        self._on_codes(row, codes)
