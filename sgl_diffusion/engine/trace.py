"""A record of what each thread of the worker did when, in the format that Perfetto reads.

It is off until somebody asks for it. Of a long record the newest part is kept.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

_MOST_SPANS = 20_000  # what a control message carries

Span = tuple[str, float, float, str, dict[str, Any]]  # name, begin, end, thread, arguments


class Trace:
    """Any thread may add spans; one starts and stops it."""

    def __init__(self, device: torch.device) -> None:
        self._ranges = device.type == "cuda"  # for Nsight, which shows them beside the kernels
        self._spans: deque[Span] | None = None
        self._began = 0.0

    @property
    def on(self) -> bool:
        return self._spans is not None

    def start(self) -> None:
        self._spans, self._began = deque(maxlen=_MOST_SPANS), time.perf_counter()

    def stop(self) -> list[dict[str, Any]]:
        """The events of the record, which ends here."""
        spans, self._spans = self._spans, None
        assert spans is not None, "a trace is stopped once"
        return _events(list(spans), self._began)

    @contextlib.contextmanager
    def span(self, name: str, **about: Any) -> Iterator[None]:
        """What happens inside it is one span."""
        if self._spans is None:
            yield
            return
        if self._ranges:
            torch.cuda.nvtx.range_push(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._ranges:
                torch.cuda.nvtx.range_pop()
            self.add(name, begin, time.perf_counter(), **about)

    def add(self, name: str, begin: float, end: float, **about: Any) -> None:
        """A span that is over."""
        spans = self._spans  # it may be stopped meanwhile
        if spans is not None and begin >= self._began:
            spans.append((name, begin, end, threading.current_thread().name, about))


def _events(spans: list[Span], began: float) -> list[dict[str, Any]]:
    """Complete events in microseconds, and the names of their threads."""
    threads = list(dict.fromkeys(thread for _, _, _, thread, _ in spans))
    named = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": thread}}
        for number, thread in enumerate(threads)
    ]
    return named + [
        {
            "name": name,
            "ph": "X",
            "pid": 1,
            "tid": threads.index(thread),
            "ts": round((begin - began) * 1e6, 1),
            "dur": round((end - begin) * 1e6, 1),
            "args": about,
        }
        for name, begin, end, thread, about in spans
    ]
