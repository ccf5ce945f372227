"""How far a download is, told in notes or numbers instead of bars."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

EVERY_SECONDS = 5.0

Note = Callable[[str], None]
Report = Callable[[int, int], None]  # bytes that are there, and bytes of all


def byte_bar(report: Report) -> type[Any]:
    """A tqdm class for huggingface_hub, which updates it from many threads and has several of it,
    for bytes and files: `report` hears of every change of the bytes."""
    from tqdm.auto import tqdm

    lock = threading.Lock()
    there: dict[int, int] = {}  # of each bar: bytes that came and bytes that are written

    class ByteBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            with lock:
                if self.unit == "B":
                    there[id(self)] = int(self.n)
                    done = max(there.values())
                    report(done, max(int(self.total or 0), done))
            return shown

    return ByteBar


def note_bytes(name: str, note: Note) -> Report:
    """Tells `note` every few seconds."""
    told = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= EVERY_SECONDS:
            told = time.monotonic()
            note(f"downloading {name}: {size_text(done)} of {size_text(total)}")

    return report


def size_text(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
