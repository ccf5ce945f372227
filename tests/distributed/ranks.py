"""Ranks for tests: processes with gloo groups that run the same function at the same time.

They are forked from a server that has imported torch once. Nothing waits for ever: a rank that
does not answer in time ends them all.
"""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.distributed.group import Group
from sgl_diffusion.distributed.mesh import join_world, leave_world

SECONDS = 300.0


def _serve(rank: int, ranks: int, rendezvous: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    everyone = join_world(rendezvous, rank, ranks, torch.device("cpu"))
    try:
        while (task := pipe.recv()) is not None:
            function, args = task
            try:
                pipe.send((True, function(everyone, *args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    finally:
        leave_world()


class Ranks:
    def __init__(self, ranks: int, rendezvous: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.ranks", "sgl_diffusion.ops"])
        pipes = [context.Pipe() for _ in range(ranks)]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, ranks, rendezvous, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """`function(everyone, *args)` on every rank; their results in order."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self.kill()
                raise AssertionError(f"rank {rank} did not answer within {seconds} s")
            done, result = pipe.recv()
            assert done, f"rank {rank}: {result}"
            results.append(result)
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        # The helpers of multiprocessing stay behind as children; other tests count theirs.
        forkserver._forkserver._stop()
        resource_tracker._resource_tracker._stop()


@contextmanager
def running_ranks(ranks: int, folder: Path) -> Iterator[Ranks]:
    started = Ranks(ranks, folder / "rendezvous")
    try:
        yield started
    finally:
        if all(process.is_alive() for process in started.processes):
            started.close()
        else:
            started.kill()


__all__ = ["Group", "Ranks", "running_ranks"]
