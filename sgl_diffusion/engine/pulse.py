"""A pulse for long forward passes on the CPU.

A worker that is silent for two minutes is taken for hung. One forward pass of a large model on a
CPU can take longer, so the outbox is polled between its blocks. On a GPU the blocks are only put
into a queue, all within moments: a call between them would come too early to help.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

EVERY_SECONDS = 1.0


def keep_pulse(
    modules: Iterable[nn.Module], device: torch.device, poll: Callable[[], None]
) -> None:
    """Call `poll` before a call of one of `modules`, at most once in `EVERY_SECONDS`."""
    if device.type != "cpu":
        return
    last = time.monotonic()

    def beat(module: nn.Module, arguments: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_SECONDS:
            last = now
            poll()

    for module in modules:
        module.register_forward_pre_hook(beat)
