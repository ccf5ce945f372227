"""Euler on a flow model: `next = x + (sigma' - sigma) * v`, put in terms of x and x0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sgl_diffusion.components.samplers.options import check_options
from sgl_diffusion.components.samplers.schedule import euler_schedule
from sgl_diffusion.components.samplers.solver import COLUMNS, Solver

SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}


def build(
    config: Mapping[str, Any], steps: int, flow_shift: float | None, start: int = 0
) -> Solver:
    """The table for a FlowMatchEulerDiscreteScheduler's config."""
    check_options("FlowMatchEulerDiscreteScheduler", config, SUPPORTED, defaults={})
    shift = float(config.get("shift", 1.0) if flow_shift is None else flow_shift)
    sigmas, timesteps = euler_schedule(steps, shift, int(config.get("num_train_timesteps", 1000)))
    now, following = sigmas[:-1].astype(np.float64), sigmas[1:].astype(np.float64)
    table = np.zeros((steps, len(COLUMNS)))
    table[:, COLUMNS.index("sigma")] = now
    table[:, COLUMNS.index("c_x")] = 1
    table[:, COLUMNS.index("p_x")] = following / now
    table[:, COLUMNS.index("p_x0")] = 1 - following / now
    return Solver(torch.from_numpy(timesteps), torch.from_numpy(table).float(), start)
