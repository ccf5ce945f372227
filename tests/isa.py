"""CPU kernel levels for tests, within what SGLD_CPU_ISA allows: `make test-isa` sets it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sgl_diffusion.ops import library


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Cap the kernels at a level; skips where it cannot be reached."""
    if library.absent():
        pytest.skip(library.absent())
    library.restore_cpu_isa()
    if library.CPU_ISAS.index(torch.ops.sgld.cpu_isa()) > library.CPU_ISAS.index(level):
        pytest.skip(f"no {level} here: this CPU or SGLD_CPU_ISA ends at a lower level")
    try:
        torch.ops.sgld.cap_cpu_isa(level)
        assert torch.ops.sgld.cpu_isa() == level
        yield
    finally:
        library.restore_cpu_isa()
