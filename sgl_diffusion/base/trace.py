"""A record of what each thread of a process did when, in the format that Perfetto reads.

It is off until somebody asks for it. Of a long record the newest part is kept.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

_MOST_SPANS = 20_000  # what a control message carries

Span = tuple[str, float, float, str, dict[str, Any]]  # name, begin, end, thread, arguments
Event = dict[str, Any]


class Record:
    """Any thread may add spans; one starts and stops it."""

    def __init__(self) -> None:
        self._spans: deque[Span] | None = None
        self._began = 0.0

    @property
    def on(self) -> bool:
        return self._spans is not None

    def start(self) -> None:
        self._spans, self._began = deque(maxlen=_MOST_SPANS), time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """The events of the record, which ends here, and when it began."""
        spans, self._spans = self._spans, None
        assert spans is not None, "a record is stopped once"
        return {"traceEvents": _events(list(spans), self._began), "began": self._began}

    def span(self, name: str, **about: Any) -> AbstractContextManager[None]:
        """What happens inside it is one span."""
        return self._span(name, about) if self.on else nullcontext()

    @contextmanager
    def _span(self, name: str, about: dict[str, Any]) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, begin, time.perf_counter(), **about)

    def add(self, name: str, begin: float, end: float, **about: Any) -> None:
        """A span that is over."""
        spans = self._spans  # it may be stopped meanwhile
        if spans is not None and begin >= self._began:
            spans.append((name, begin, end, threading.current_thread().name, about))


def joined(processes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One file of what `stop` gave in processes of this machine, whose clock is one and the same;
    it begins with the first of them."""
    first = min(found["began"] for found in processes.values())
    events: list[Event] = []
    for number, (name, found) in enumerate(processes.items(), 1):
        events.append(_named("process_name", number, 0, name))
        later = (found["began"] - first) * 1e6
        for event in found["traceEvents"]:
            when = {"ts": round(event["ts"] + later, 1)} if "ts" in event else {}
            events.append({**event, **when, "pid": number})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(spans: list[Span], began: float) -> list[Event]:
    """Complete events in microseconds, and the names of their threads."""
    threads = list(dict.fromkeys(thread for _, _, _, thread, _ in spans))
    named = [_named("thread_name", 1, number, thread) for number, thread in enumerate(threads)]
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


def _named(what: str, process: int, thread: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
