"""Solvers as tables: a step of any linear multistep sampler is one row of nine coefficients.

With x the latents a step starts from, v the model's velocity there, and the history `last` (the
latents of the previous step after correction), `m0`, `m1` (the two previous predictions of the
clean latents), a step computes

    x0        = x - sigma * v
    corrected = c_x * x + c_last * last + c_m0 * m0 + c_m1 * m1 + c_x0 * x0
    next      = p_x * corrected + p_x0 * x0 + p_m0 * m0

so jobs at different steps, of different orders and even of different samplers share one fused
update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sgl_diffusion import ops

COLUMNS = ("sigma", "c_x", "c_last", "c_m0", "c_m1", "c_x0", "p_x", "p_x0", "p_m0")


@dataclass(frozen=True)
class Solver:
    """One job's `timesteps` [n] for the model and `table` [n, 9], row i for step i; fp32, CPU.

    The rows from `start` on are used; the first of them leans on no history.
    """

    timesteps: Tensor
    table: Tensor
    start: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    def sigma(self, step: int) -> float:
        """How much of the latents is noise before `step`; behind the last step there is none."""
        return float(self.table[step, 0]) if step < len(self) else 0.0


class SolverState(NamedTuple):
    """Latents and history of a batch of jobs, each [B, ...] in fp32."""

    x: Tensor
    last: Tensor
    m0: Tensor
    m1: Tensor

    @classmethod
    def start(cls, noise: Tensor) -> SolverState:
        """The state before step 0; the first rows of a table weigh the empty history with 0."""
        empty = torch.zeros_like(noise, dtype=torch.float32)
        return cls(noise.float(), empty, empty, empty)

    @property
    def x0(self) -> Tensor:
        """The clean latents as the latest step predicted them (zeros before the first)."""
        return self.m0

    def rows(self) -> list[SolverState]:
        """The batch as single jobs, each keeping a batch axis of 1."""
        return [SolverState(*parts) for parts in zip(*(t.split(1) for t in self), strict=True)]


def stack(states: Sequence[SolverState]) -> SolverState:
    """Several states as one batch, the inverse of `SolverState.rows`."""
    return SolverState(*(torch.cat(tensors) for tensors in zip(*states, strict=True)))


def advance(
    state: SolverState,
    velocity: Tensor,
    rows: Tensor,
    *,
    unguided: Tensor | None = None,
    guidance: Tensor | None = None,
) -> SolverState:
    """The state after one step: `velocity` [B, ...] of any float type, `rows` [B, 9] of tables.

    With `unguided`, the velocity without the prompt, v is
    `unguided + guidance * (velocity - unguided)`, with `guidance` [B] in fp32.
    """
    assert rows.shape == (state.x.shape[0], len(COLUMNS)), rows.shape
    x, last, m0, m1 = state
    step = ops.cfg_combine_step(x, velocity, unguided, guidance, rows, last, m0, m1)
    return SolverState(*step)
