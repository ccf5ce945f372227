"""Where weights are while they are away, and who brings them.

On a CPU they stay in the checkpoint and a thread reads them. For a GPU they are copied once to the
memory of the host, from where a stream of its own takes them over. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from sgl_diffusion.engine.offload.units import Unit

Fill = Callable[[Unit, Tensor], None]  # writes the weights of a unit into a buffer


class Arrival(Protocol):
    """Of weights that are under way."""

    @property
    def failed(self) -> bool: ...

    def wait(self) -> None:
        """Until they can be computed with; raises if they did not come."""


class Carrier(Protocol):
    """Brings weights while something else is computed, in the order in which it is told to."""

    def buffer(self, nbytes: int) -> Tensor: ...

    def bring(self, unit: Unit, buffer: Tensor, free: Sequence[object]) -> Arrival:
        """After the marks in `free` nobody computes with the buffer any more."""

    def mark(self, buffer: Tensor) -> object:
        """What this thread has begun so far, with a buffer among others."""


class Reader:
    """Reads ahead, in a thread."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def buffer(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # the thread is not in that mode, and writes to it
            return torch.empty(nbytes, dtype=torch.uint8)

    def bring(self, unit: Unit, buffer: Tensor, free: Sequence[object]) -> Arrival:
        return _Read(self._threads.submit(self._fill, unit, buffer))

    def mark(self, buffer: Tensor) -> object:
        return None  # on a CPU what was begun is done


class _Read:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    @property
    def failed(self) -> bool:
        return self._future.done() and self._future.exception() is not None

    def wait(self) -> None:
        self._future.result()


class Copier:
    """Copies from the host on a stream of its own. Not yet run on a GPU."""

    def __init__(self, fill: Fill, device: torch.device) -> None:
        self._fill = fill
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        buffer.record_stream(self._stream)
        return buffer

    def bring(self, unit: Unit, buffer: Tensor, free: Sequence[object]) -> Arrival:
        with torch.cuda.stream(self._stream):
            for event in free:
                assert isinstance(event, torch.cuda.Event)
                self._stream.wait_event(event)
            self._fill(unit, buffer)
            return _Copied(self._stream.record_event())

    def mark(self, buffer: Tensor) -> object:
        stream = torch.cuda.current_stream(self._device)
        buffer.record_stream(stream)
        return stream.record_event()


class _Copied:
    failed = False

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def from_checkpoint(unit: Unit, buffer: Tensor) -> None:
    for place in unit.places:
        place.home.read(place.view(buffer))


class FromHost:
    """Fills buffers from copies in the memory of the host."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._copies: dict[Unit, Tensor] = {}

    def take(self, unit: Unit) -> None:
        """Read a unit from the checkpoint, once."""
        copy = torch.empty(unit.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        from_checkpoint(unit, copy)
        self._copies[unit] = copy

    def __call__(self, unit: Unit, buffer: Tensor) -> None:
        buffer[: unit.nbytes].copy_(self._copies[unit], non_blocking=True)
