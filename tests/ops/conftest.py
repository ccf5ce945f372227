"""The implementations that this process can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.ops import library

LEVELS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "scalar")
IMPLEMENTATIONS = ("torch", "cpu-avx512_bf16", "cpu-avx512", "cpu-avx2", "cpu-scalar")


@pytest.fixture(params=IMPLEMENTATIONS)
def norm_modulate_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Names the implementation of norm_modulate and forces the CPU level for one test."""
    name, _, isa = request.param.partition("-")
    if isa:
        if library.absent():
            pytest.skip(library.absent())
        torch.ops.sgld.cap_cpu_isa(isa)
        if torch.ops.sgld.cpu_isa() != isa:
            torch.ops.sgld.cap_cpu_isa(library.CPU_ISAS[0])
            pytest.skip(f"this CPU has no {isa}")
    with ops.using(norm_modulate=name):
        ops.reset_counts()
        yield name
    if isa:
        torch.ops.sgld.cap_cpu_isa(library.CPU_ISAS[0])


@pytest.fixture(params=("torch", *(f"cpu-{isa}" for isa in LEVELS)))
def attention_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Names the implementation of attention and forces the CPU level for one test."""
    name, _, isa = request.param.partition("-")
    if isa:
        if library.absent():
            pytest.skip(library.absent())
        torch.ops.sgld.cap_cpu_isa(isa)
        if torch.ops.sgld.cpu_isa() != isa:
            torch.ops.sgld.cap_cpu_isa(library.CPU_ISAS[0])
            pytest.skip(f"this CPU has no {isa}")
    with ops.using(attention=name, attention_merge=name):
        ops.reset_counts()
        yield name
    if isa:
        torch.ops.sgld.cap_cpu_isa(library.CPU_ISAS[0])
