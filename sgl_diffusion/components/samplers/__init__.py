"""Samplers: a noise schedule and a solver, as one table, from scheduler_config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sgl_diffusion.base.errors import ConfigError, RequestError
from sgl_diffusion.base.registry import Registry
from sgl_diffusion.components.samplers import flow_euler, unipc
from sgl_diffusion.components.samplers.options import UNSUPPORTED, unsupported
from sgl_diffusion.components.samplers.schedule import Spacing, dynamic_mu
from sgl_diffusion.components.samplers.solver import Solver, SolverState, advance, stack

__all__ = [
    "SAMPLERS",
    "UNSUPPORTED",
    "Solver",
    "SolverState",
    "Spacing",
    "advance",
    "dynamic_mu",
    "make_solver",
    "stack",
]

_PLAIN = Spacing()

# From config, steps, flow shift, spacing and the first step that is run.
Builder = Callable[[Mapping[str, Any], int, float | None, Spacing, int], Solver]

# Keyed by the class a repository names in its scheduler_config.json.
SAMPLERS: Registry[Builder] = Registry(
    "sampler",
    {
        "UniPCMultistepScheduler": unipc.build,
        "FlowMatchEulerDiscreteScheduler": flow_euler.build,
    },
)


def make_solver(
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    flow_shift: float | None = None,
    spacing: Spacing = _PLAIN,
    *,
    start: int = 0,
) -> Solver:
    """The solver of one job. `flow_shift` overrides the shift of the config and of `spacing`;
    `start` is the first step that is run, where denoising begins with a picture.

    A scheduler this package does not compute raises a ConfigError with the code `UNSUPPORTED`.
    """
    train_steps = int(scheduler_config.get("num_train_timesteps", 1000))
    if not 1 <= num_steps <= train_steps:
        raise RequestError(
            f"A model cannot run {num_steps} denoise steps.",
            hint=f"Use 1 to {train_steps}.",
            param="num_inference_steps",
        )
    if flow_shift is not None and not (math.isfinite(flow_shift) and flow_shift > 0):
        raise RequestError(
            f"The flow shift {flow_shift} is not a positive number.", param="flow_shift"
        )
    name = scheduler_config.get("_class_name")
    if not isinstance(name, str):
        raise ConfigError("The scheduler config has no _class_name.", param="scheduler")
    if name not in SAMPLERS:
        raise unsupported(f"The sampler {name} is not supported, only {', '.join(SAMPLERS)}.")
    return SAMPLERS.get(name)(scheduler_config, num_steps, flow_shift, spacing, start)
