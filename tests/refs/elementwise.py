"""The elementwise ops in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    if gate is None:
        return x.double() + y.double()
    if gate.ndim == 2 and x.ndim == 3:
        gate = gate[:, None, :]
    return x.double() + y.double() * gate.double()


def gelu_tanh(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate.double() / (1.0 + torch.exp(-gate.double())) * up.double()
