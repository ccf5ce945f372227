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

from sgl_diffusion.ar.alone import alone
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
    last of them. `on_failed` hears of a row that cannot go on, which the others do. Rows wait while
    as many speak as the talker has room for."""

    def __init__(
        self,
        talker: Talker,
        on_codes: Callable[[SpeechRow, Tensor], None],
        on_failed: Callable[[SpeechRow, Exception], None],
    ) -> None:
        self._talker = talker
        self._on_codes = on_codes
        self._on_failed = on_failed
        self.waiting: deque[SpeechRow] = deque()
        self.rows: list[SpeechRow] = []
        self.steps: Counter[int] = Counter()

    def add(self, row: SpeechRow) -> None:
        self.waiting.append(row)

    def drop(self, row: SpeechRow) -> None:
        """Free what it holds, wherever it is."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row.slot is not None:
            self._talker.kv.clear(row.slot)
            self._leave(row)

    def step(self) -> bool:
        """One frame of every row whose next word is known."""
        began = self._begin()
        ready = [row for row in self.rows if row.words or row.told_all]
        for row in ready:
            with alone(row, self._fail):
                self._first(row)
        # A row may have left with its job, which another row ended.
        speaking = [row for row in ready if row.slot is not None]
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
        self.rows.append(row)
        with alone(row, self._fail):
            row.logits, row.state = self._talker.prefill(row.slot, row.opening)
        return True

    def _first(self, row: SpeechRow) -> None:
        """Draw code 0 of the next frame, or end the speech."""
        if row.slot is None:
            return  # its job failed with another row
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

    def _advance(self, rows: list[SpeechRow]) -> None:
        states = [row.state for row in rows if row.state is not None]
        broken: dict[int, Exception] = {}

        def draw(index: int, _: int, logits: Tensor) -> int:
            try:
                return rows[index].detail(logits).token
            except Exception as error:
                broken.setdefault(index, error)
                return 0  # stands for nothing: the row leaves when the others have their codes

        codes, vectors = self._talker.frames(
            torch.stack(states), [row.history[-1] for row in rows], draw
        )
        for index, error in broken.items():
            self._fail(rows[index], error)
        slots = self._talker.kv.slots
        if not slots:
            return
        inputs = vectors.new_zeros(len(slots), vectors.shape[1])
        positions = torch.tensor([slot.length for slot in slots], device=vectors.device)
        writing = [False] * len(slots)
        for row, frame, vector in zip(rows, codes, vectors, strict=True):
            if row.slot is None:
                continue
            at = row.slot.index
            inputs[at] = vector + (row.words.popleft() if row.words else row.opening.silence)
            positions[at] += row.opening.shift
            writing[at] = True
            row.waiting.append(frame)
        logits, fresh = self._talker.decode(inputs, positions, writing)
        places = {row: row.slot.index for row in rows if row.slot is not None}
        for row, at in places.items():
            if row.slot is None:
                continue
            row.logits, row.state = logits[at], fresh[at]
            if len(row.waiting) >= row.piece * self._talker.pace:
                with alone(row, self._fail):
                    self._hand_over(row)

    def _finish(self, row: SpeechRow, reason: str) -> None:
        row.finish_reason = reason
        self._leave(row)
        self._hand_over(row)

    def _fail(self, row: SpeechRow, error: Exception) -> None:
        if row.slot is not None or row.finish_reason is not None:  # else its job failed before
            self.drop(row)
            self._on_failed(row, error)

    def _leave(self, row: SpeechRow) -> None:
        assert row.slot is not None
        self._talker.kv.leave(row.slot)
        row.slot = None
        self.rows.remove(row)

    def _hand_over(self, row: SpeechRow) -> None:
        codes = torch.zeros(self._talker.groups, 0, dtype=torch.long)
        if row.waiting:
            codes = torch.stack(row.waiting, dim=1)
            row.waiting.clear()
            row.piece = min(2 * row.piece, LARGEST_PIECE)
        self._on_codes(row, codes)
