"""How far a download is, told in notes instead of bars."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

EVERY_SECONDS = 5.0

Note = Callable[[str], None]


def note_bar(name: str, note: Note) -> type[Any]:
    """A tqdm class for huggingface_hub, which updates it from many threads and for bytes and files
    alike: every few seconds `note` hears how many bytes are there."""
    from tqdm.auto import tqdm

    lock = threading.Lock()
    told = time.monotonic()

    class NoteBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal told
            shown: bool | None = super().update(n)
            with lock:
                if self.unit == "B" and time.monotonic() - told >= EVERY_SECONDS:
                    told = time.monotonic()
                    total = max(self.total or 0, self.n)
                    note(f"downloading {name}: {_size(self.n)} of {_size(total)}")
            return shown

    return NoteBar


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
