"""Progress of one job: a bar on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Snapshot

_WIDTH = 28
_PLAIN_SECONDS = 5.0


class Progress:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._started = 0.0
        self._first_step = 0
        self._last_line = 0.0
        self._last_shown = ("", -1)
        self._bar_open = False

    def say(self, line: str) -> None:
        self.end()
        print(line, file=self._out, flush=True)

    def show(self, snapshot: Snapshot) -> None:
        """Called with every change of the job."""
        if snapshot.total <= 0 or (snapshot.phase, snapshot.step) == self._last_shown:
            return
        now = time.monotonic()
        new_phase = snapshot.phase != self._last_shown[0]
        if new_phase:
            self._started, self._first_step = now, snapshot.step
        self._last_shown = (snapshot.phase, snapshot.step)
        text = f"{snapshot.step}/{snapshot.total} {snapshot.phase}{self._eta(snapshot, now)}"
        if self._is_terminal:
            filled = _WIDTH * snapshot.step // snapshot.total
            bar = "#" * filled + "." * (_WIDTH - filled)
            print(f"\r\x1b[K[{bar}] {text}", end="", file=self._out, flush=True)
            self._bar_open = True
        elif new_phase or snapshot.step == snapshot.total or now - self._last_line > _PLAIN_SECONDS:
            print(text, file=self._out, flush=True)
            self._last_line = now

    def end(self) -> None:
        """Leave the line of the bar."""
        if self._bar_open:
            print(file=self._out, flush=True)
            self._bar_open = False

    def _eta(self, snapshot: Snapshot, now: float) -> str:
        done = snapshot.step - self._first_step
        if done <= 0 or snapshot.step >= snapshot.total:
            return ""
        per_step = (now - self._started) / done
        return f"  {per_step:.2f} s/step, {per_step * (snapshot.total - snapshot.step):.0f} s left"
