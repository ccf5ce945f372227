"""Encoding and decoding beside the denoise steps, in threads and streams of their own.

Each lane does one thing at a time. What it leads to is taken over by the thread that runs the
steps, between two of them: jobs and rows are changed there only. On a CPU a lane has one thread, so
that the steps keep theirs; on a GPU it has a stream, which begins behind the work that was queued
so far. The streams have not run yet.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from sgl_diffusion.engine.prompts import tensors_in

T = TypeVar("T")
Lane = Literal["encode", "decode"]


@dataclass(frozen=True)
class _Work:
    lane: Lane
    future: Future[Any]
    take: Callable[[Any], None]
    fail: Callable[[Exception], None]


class Beside:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: dict[Lane, ThreadPoolExecutor] = {}
        self._under_way: list[_Work] = []

    def free(self, lane: Lane) -> bool:
        return all(work.lane != lane for work in self._under_way)

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def start(
        self,
        lane: Lane,
        work: Callable[[], T],
        take: Callable[[T], None],
        fail: Callable[[Exception], None],
    ) -> None:
        """Begin it in its lane; later, out of `collect`, take its result or its error."""
        assert self.free(lane), f"the lane {lane} is busy"
        if lane not in self._pools:
            self._pools[lane] = self._pool(lane)
        begun = None
        if self._device.type == "cuda":
            begun = torch.cuda.Event()
            begun.record()
        future = self._pools[lane].submit(self._run, work, begun)
        self._under_way.append(_Work(lane, future, take, fail))

    def collect(self) -> None:
        """Take over what is done."""
        for work in [work for work in self._under_way if work.future.done()]:
            self._under_way.remove(work)
            error = work.future.exception()
            if error is None:
                self._adopt(work.future.result())
                work.take(work.future.result())
            elif isinstance(error, Exception):
                work.fail(error)
            else:
                raise error

    def wait(self, seconds: float | None = None) -> None:
        """Until something is done, or so long."""
        futures = [work.future for work in self._under_way]
        concurrent.futures.wait(futures, seconds, concurrent.futures.FIRST_COMPLETED)

    def settle(self) -> None:
        """Wait for everything: whoever changes weights must not meet a lane that reads them."""
        while self._under_way:
            self.wait()
            self.collect()

    def _pool(self, lane: Lane) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(1, thread_name_prefix=f"sgld-{lane}")
        if self._device.type == "cpu":
            # torch keeps one number for threads that come later, and one for each that is there.
            threads = torch.get_num_threads()
            pool.submit(torch.set_num_threads, 1).result()
            torch.set_num_threads(threads)
        return pool

    def _run(self, work: Callable[[], T], begun: torch.cuda.Event | None) -> T:
        with self._stream(begun):
            return work()

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
