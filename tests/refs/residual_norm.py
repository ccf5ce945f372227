"""gate_residual_norm_modulate in float64."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.refs.elementwise import gate_residual
from tests.refs.norm_modulate import norm_modulate


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, rounded: Tensor, **norm: Any
) -> tuple[Tensor, Tensor]:
    """The residual, and the norm of it as the implementation under test rounded it."""
    return gate_residual(x, y, gate), norm_modulate(rounded, **norm)
