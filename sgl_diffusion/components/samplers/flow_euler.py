"""Euler on a flow model: `next = x + (sigma' - sigma) * v`, put in terms of x and x0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sgl_diffusion.components.samplers.options import check_options, unsupported
from sgl_diffusion.components.samplers.schedule import Spacing, euler_schedule
from sgl_diffusion.components.samplers.solver import COLUMNS, Solver

SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "invert_sigmas": (False,),
    "time_shift_type": ("exponential", "linear"),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}


def build(
    config: Mapping[str, Any],
    steps: int,
    flow_shift: float | None,
    spacing: Spacing,
    start: int,
) -> Solver:
    """The table for a FlowMatchEulerDiscreteScheduler's config."""
    check_options("FlowMatchEulerDiscreteScheduler", config, SUPPORTED, defaults={})
    sigmas, timesteps = euler_schedule(steps, _shift(config, flow_shift, spacing), config, spacing)
    now, following = sigmas[:-1].astype(np.float64), sigmas[1:].astype(np.float64)
    table = np.zeros((steps, len(COLUMNS)))
    table[:, COLUMNS.index("sigma")] = now
    table[:, COLUMNS.index("c_x")] = 1
    table[:, COLUMNS.index("p_x")] = following / now
    table[:, COLUMNS.index("p_x0")] = 1 - following / now
    return Solver(torch.from_numpy(timesteps), torch.from_numpy(table).float(), start)


def _shift(config: Mapping[str, Any], flow_shift: float | None, spacing: Spacing) -> float:
    """The factor of `shift_sigmas`: the request's, that of the picture's size, or the config's."""
    if flow_shift is not None:
        return flow_shift
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    if spacing.mu is None:
        raise unsupported("A shift that depends on the size of the picture is not supported here.")
    return math.exp(spacing.mu) if config.get("time_shift_type") != "linear" else spacing.mu
