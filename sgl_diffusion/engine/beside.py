"""Errands beside the denoise steps, in threads and streams of their own.

Each lane does one errand at a time. What it leads to is taken over by the thread that runs the
steps, between two of them: jobs and rows are changed there only. A lane has one thread of a CPU, so
that the steps keep theirs; on a GPU it has a stream, too, which begins behind the work that was
queued so far. The streams have not run yet.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from sgl_diffusion.engine.errand import Errand, Lane, Outcome
from sgl_diffusion.engine.prompts import tensors_in
from sgl_diffusion.engine.threads import pool_of
from sgl_diffusion.engine.trace import Trace


@dataclass(frozen=True)
class _Way:
    errand: Errand
    future: Future[Outcome]
    hurry: threading.Event


class Beside:
    def __init__(self, device: torch.device, trace: Trace) -> None:
        self._device = device
        self._trace = trace
        self._pools: dict[Lane, ThreadPoolExecutor] = {}
        self._under_way: dict[Lane, _Way] = {}

    def free(self, lane: Lane) -> bool:
        return lane not in self._under_way

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def start(self, errand: Errand) -> None:
        """Begin it in its lane; what comes of it comes out of `collect`."""
        lane = errand.lane
        assert self.free(lane), f"the lane {lane} is busy"
        if lane not in self._pools:
            threads = 1 if self._device.type == "cpu" else torch.get_num_threads()
            self._pools[lane] = pool_of(1, threads, f"sgld-{lane}")
        begun = None
        if self._device.type == "cuda":
            begun = torch.cuda.Event()
            begun.record()
        hurry = threading.Event()
        future = self._pools[lane].submit(self._run, errand, hurry, begun)
        self._under_way[lane] = _Way(errand, future, hurry)

    def hurry(self, lane: Lane) -> None:
        """What is done there ends with its present chunk."""
        if way := self._under_way.get(lane):
            way.hurry.set()

    def collect(self) -> list[Outcome]:
        """What is done."""
        done = [way for way in self._under_way.values() if way.future.done()]
        for way in done:
            del self._under_way[way.errand.lane]
        outcomes = [way.future.result() for way in done]
        for outcome in outcomes:
            self._adopt(outcome.result)
        return outcomes

    def wait(self, seconds: float, more: Sequence[Future[Any]] = ()) -> None:
        """Until something is done, here or of `more`, or so long."""
        futures = [*more, *(way.future for way in self._under_way.values())]
        concurrent.futures.wait(futures, seconds, concurrent.futures.FIRST_COMPLETED)

    def _run(
        self, errand: Errand, hurry: threading.Event, begun: torch.cuda.Event | None
    ) -> Outcome:
        def go_on() -> bool:
            return not hurry.is_set()

        start = time.perf_counter()
        result, error = None, None
        with self._trace.span(errand.lane, job=errand.job.id), self._stream(begun):
            try:
                result = errand.work(go_on)
            except Exception as caught:
                error = caught
        return Outcome(errand, result, error, time.perf_counter() - start)

    @contextlib.contextmanager
    def _stream(self, begun: torch.cuda.Event | None) -> Iterator[None]:
        if begun is None:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(begun)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def _adopt(self, result: Any) -> None:
        """Memory of another stream is given back only when this one is done with it."""
        if self._device.type == "cuda":
            for tensor in tensors_in(result):
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(self._device))
