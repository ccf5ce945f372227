"""Progress of one job: a bar on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import os
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
            print(f"\r\x1b[K{self._bar(snapshot, text)}", end="", file=self._out, flush=True)
            self._bar_open = True
        elif new_phase or snapshot.step == snapshot.total or now - self._last_line > _PLAIN_SECONDS:
            print(text, file=self._out, flush=True)
            self._last_line = now

    def end(self) -> None:
        """Leave the line of the bar."""
        if self._bar_open:
            print(file=self._out, flush=True)
            self._bar_open = False

    def _bar(self, snapshot: Snapshot, text: str) -> str:
        """A line that fits the terminal: one that wraps cannot be overwritten."""
        room = _columns(self._out) - 1
        width = min(_WIDTH, room - len(text) - 3)
        if width < 1:
            return text[:room]
        filled = width * snapshot.step // snapshot.total
        return f"[{'#' * filled}{'.' * (width - filled)}] {text}"

    def _eta(self, snapshot: Snapshot, now: float) -> str:
        done = snapshot.step - self._first_step
        if done <= 0 or snapshot.step >= snapshot.total:
            return ""
        per_step = (now - self._started) / done
        return f"  {per_step:.2f} s/step, {per_step * (snapshot.total - snapshot.step):.0f} s left"


def _columns(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except OSError:  # it has no size
        return 80
