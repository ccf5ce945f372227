"""The implementations that this process can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from sgl_diffusion import ops
from tests.isa import at_level

LEVELS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "scalar")
IMPLEMENTATIONS = ("torch", "cpu-avx512_bf16", "cpu-avx512", "cpu-avx2", "cpu-scalar")
MEMORY_BOUND = (
    "cfg_combine_step",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gelu_tanh",
    "qk_norm_rope",
    "quant_fp8_rowwise",
    "silu_mul",
)


@contextmanager
def forced(implementation: str, *names: str) -> Iterator[str]:
    """Names an implementation of some ops, and its CPU level ("cpu-avx2"), for one test."""
    name, _, isa = implementation.partition("-")
    level = at_level(isa) if isa else nullcontext()
    with level, ops.using(**dict.fromkeys(names, name)):
        ops.reset_counts()
        yield name


@pytest.fixture(params=IMPLEMENTATIONS)
def norm_modulate_by(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param, "norm_modulate") as name:
        yield name


@pytest.fixture(params=IMPLEMENTATIONS)
def memory_bound_by(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param, *MEMORY_BOUND) as name:
        yield name


@pytest.fixture(params=("torch", *(f"cpu-{isa}" for isa in LEVELS)))
def attention_by(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param, "attention", "attention_merge") as name:
        yield name
