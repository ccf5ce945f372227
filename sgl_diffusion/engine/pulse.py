"""Staying alive through long forward passes.

A worker that is silent for two minutes is taken for hung. One forward pass of a large model on a
CPU can take longer, so the outbox is polled between its blocks, and before each convolution in
them: one block of a VAE at full size is long. On a GPU the blocks are only put into a queue, all
within moments; there the host waits for each unit of work and polls meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

EVERY_SECONDS = 1.0


def keep_pulse(
    modules: Iterable[nn.Module], device: torch.device, poll: Callable[[], None]
) -> None:
    """Call `poll` before a call of one of `modules` or of a convolution in them, at most once in
    `EVERY_SECONDS` in each thread."""
    if device.type != "cpu":
        return
    last = {threading.get_ident(): time.monotonic()}

    def beat(module: nn.Module, arguments: object) -> None:
        thread, now = threading.get_ident(), time.monotonic()
        if now - last.setdefault(thread, now) >= EVERY_SECONDS:
            last[thread] = now
            poll()

    for module in modules:
        for inner in module.modules():
            if inner is module or isinstance(inner, nn.Conv2d | nn.Conv3d):
                inner.register_forward_pre_hook(beat)


class Pace:
    """Keeps the host at most one unit of work ahead of a GPU. On a CPU it does nothing.

    Not yet run on a GPU.
    """

    def __init__(self, device: torch.device, poll: Callable[[], None]) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._poll = poll

    @property
    def lags(self) -> bool:
        """Whether the device may still work when the host has finished a unit."""
        return self._event is not None

    def mark(self) -> None:
        """The work so far is what `wait` waits for."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is None:
            return
        polled = time.monotonic()
        while not self._event.query():
            time.sleep(0.0002)
            if time.monotonic() - polled >= EVERY_SECONDS:
                polled = time.monotonic()
                self._poll()
