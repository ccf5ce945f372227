"""What a piece of work really takes of torch's allocator, for tests of what was counted.

The allocator itself reports every block, also those that are gone before an op returns, such as
the copies that a convolution makes of its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import (
    ProfilerConfig,
    ProfilerState,
    _disable_profiler_legacy,
    _enable_profiler_legacy,
)


@dataclass
class Recorded:
    """Bytes beyond those at the beginning: the peak, and what is left."""

    peak: int = 0
    left: int = 0


@contextmanager
def recording() -> Iterator[Recorded]:
    """What this thread allocates on the CPU within the block; known after it."""
    found = Recorded()
    experimental = torch._C._profiler._ExperimentalConfig()
    _enable_profiler_legacy(
        ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, experimental)
    )
    try:
        yield found
    finally:
        for events in _disable_profiler_legacy():
            for event in events:
                if event.kind() == "memory_alloc":
                    found.left += event.cpu_memory_usage()
                    found.peak = max(found.peak, found.left)
