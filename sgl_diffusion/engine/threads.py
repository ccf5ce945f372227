"""How the threads of a CPU are shared among what goes on at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline

_MOST_LANES = (
    4  # beyond that the interpreter, which one thread at a time has, is what they wait for
)


def step_lanes(options: EngineOptions, pipeline: Pipeline) -> int:
    """How many batches of one process can take their steps at the same time: several on a CPU with
    several threads. Compiled blocks are compiled for all of them; and a transformer whose weights
    come and go has them for one step at a time."""
    away = any(part.component.startswith("transformer") for part in pipeline.card.offload)
    together = options.overlap and options.max_running_jobs != 1
    if pipeline.device.type != "cpu" or away or options.enable_torch_compile or not together:
        return 1
    return min(torch.get_num_threads(), _MOST_LANES)


def lane_threads(lanes: int) -> int:
    """Of torch's threads, those that each of so many lanes gets."""
    return max(torch.get_num_threads() // lanes, 1)


def pool_of(workers: int, threads: int, name: str) -> ThreadPoolExecutor:
    """So many threads at work, and for each so many of torch's."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    # torch keeps one number for threads that come later, and one for each that is there; a thread
    # takes over the former when it first looks, and would forget what was set before.
    before = torch.get_num_threads()
    there = threading.Barrier(workers)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(threads)
        there.wait()

    for future in [pool.submit(begin) for _ in range(workers)]:
        future.result()
    torch.set_num_threads(before)
    return pool
