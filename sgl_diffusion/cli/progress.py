"""Progress of one job or download: a bar on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, TextIO

from sgl_diffusion.loader.progress import Report, note_bytes, size_text

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Snapshot

_WIDTH = 28
_PLAIN_SECONDS = 5.0
_REDRAW_SECONDS = 0.1


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
            self._draw(snapshot.step, snapshot.total, text)
        elif new_phase or snapshot.step == snapshot.total or now - self._last_line > _PLAIN_SECONDS:
            print(text, file=self._out, flush=True)
            self._last_line = now

    def bytes_of(self, name: str) -> Report:
        """What a download calls with the bytes that are there and those of all."""
        if not self._is_terminal:
            return note_bytes(name, self.say)
        started, drawn = time.monotonic(), 0.0
        first: int | None = None

        def report(done: int, total: int) -> None:
            nonlocal drawn, first
            now = time.monotonic()
            first = done if first is None else first
            if total <= 0 or (now - drawn < _REDRAW_SECONDS and done < total):
                return
            rate = (done - first) / max(now - started, 1e-3)
            left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
            text = f"{size_text(done)} of {size_text(total)}  {size_text(rate)}/s{left}  {name}"
            self._draw(done, total, text)
            drawn = now

        return report

    def end(self) -> None:
        """Leave the line of the bar."""
        if self._bar_open:
            print(file=self._out, flush=True)
            self._bar_open = False

    def _draw(self, done: int, total: int, text: str) -> None:
        """A line that fits the terminal: one that wraps cannot be overwritten."""
        print(f"\r\x1b[K{self._bar(done, total, text)}", end="", file=self._out, flush=True)
        self._bar_open = True

    def _bar(self, done: int, total: int, text: str) -> str:
        room = _columns(self._out) - 1
        width = min(_WIDTH, room - len(text) - 3)
        if width < 1:
            return text[:room]
        filled = width * done // total
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
