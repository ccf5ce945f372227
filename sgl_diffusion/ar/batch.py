"""The rows that the thinker works on: they come and go between any two tokens.

Rows wait, are read into the cache piece by piece, then write one token per step together.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from sgl_diffusion.ar.alone import alone
from sgl_diffusion.ar.prefix import BLOCK, PrefixStore
from sgl_diffusion.ar.row import Row
from sgl_diffusion.ar.sampling import Drawn
from sgl_diffusion.ar.thinker import Thinker

_PIECE = 512


class Batch:
    """`on_token` hears of each drawn token with the text it brings, and of the last one of a row
    after it left; `on_failed` of a row that cannot go on, which the others do."""

    def __init__(
        self,
        thinker: Thinker,
        prefixes: PrefixStore,
        rows: int,
        ends: frozenset[int],
        on_token: Callable[[Row, str], None],
        on_failed: Callable[[Row, Exception], None],
    ) -> None:
        self._thinker = thinker
        self._prefixes = prefixes
        self._most = rows
        self._ends = ends
        self._on_token = on_token
        self._on_failed = on_failed
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self.steps: Counter[int] = Counter()

    def add(self, rows: list[Row]) -> None:
        self._waiting += rows

    def drop(self, rows: list[Row]) -> None:
        """Free what these rows hold, wherever they are."""
        for row in rows:
            if row in self._waiting:
                self._waiting.remove(row)
            elif row.slot is not None:
                self._thinker.kv.clear(row.slot)
                self._leave(row)

    def step(self) -> bool:
        """Read a piece of one prompt, and write a token of every row that can."""
        reading = self._reading()
        if reading is not None:
            with alone(reading, self._fail):
                self._read(reading)
        writing = [row for row in self._rows if row.last is not None]
        if writing:
            self._write(writing)
        return reading is not None or bool(writing)

    def _reading(self) -> Row | None:
        row = next((row for row in self._rows if row.last is None), None)
        if row is None and self._waiting and len(self._rows) < self._most:
            row = self._waiting.popleft()
            row.slot = self._thinker.kv.take()
            self._rows.append(row)
        return row

    def _begin(self, row: Row) -> None:
        """Take over what is known of the prompt; the last token is always read, for its logits."""
        assert row.slot is not None
        whole = (len(row.passage.vectors) - 1) // BLOCK
        for block in self._prefixes.longest(row.keys[:whole]):
            self._thinker.kv.write(row.slot, block)
        row.reused = row.slot.length

    def _read(self, row: Row) -> None:
        assert row.slot is not None
        if not row.slot.length:
            self._begin(row)
        logits = self._thinker.prefill(row.slot, row.passage, min(_PIECE, row.left_to_read()))
        if row.left_to_read():
            return
        if row.script:
            row.states.extend(row.passage.last_states(len(row.script)))
            text = row.recite(row.script)
            self._leave(row)
            self._on_token(row, text)
            return
        drawn = row.draw(logits)  # before: only finite ones are kept for others
        for index, key in enumerate(row.keys):
            if key not in self._prefixes:
                start = index * BLOCK
                self._prefixes.put(key, self._thinker.kv.read(row.slot, start, start + BLOCK))
        self._take(row, drawn)

    def _write(self, rows: list[Row]) -> None:
        self.steps[len(rows)] += 1
        by_slot = sorted(self._rows, key=_index)
        logits, states = self._thinker.decode(
            [row.last for row in by_slot], [row.passage.shift for row in by_slot]
        )
        places = {row: _index(row) for row in rows}
        for row, place in places.items():
            if row.slot is None:
                continue  # its job failed with another row
            with alone(row, self._fail):
                if row.spoken and self._thinker.tells:
                    row.states.append(states[place])
                self._take(row, row.draw(logits[place]))

    def _take(self, row: Row, drawn: Drawn) -> None:
        text = row.take(drawn, self._ends)
        if row.finish_reason is not None:
            self._leave(row)
        self._on_token(row, text)

    def _fail(self, row: Row, error: Exception) -> None:
        self.drop([row])
        self._on_failed(row, error)

    def _leave(self, row: Row) -> None:
        assert row.slot is not None
        self._thinker.kv.leave(row.slot)
        row.slot = None
        self._rows.remove(row)


def _index(row: Row) -> int:
    assert row.slot is not None
    return row.slot.index
