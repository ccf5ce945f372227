"""UniPC (arXiv 2302.04867) on a flow model: B2(h), x0 form, orders 1 and 2, with corrector.

With alpha = 1 - sigma, lambda = log(alpha / sigma), h = lambda_t - lambda_s and phi = exp(-h) - 1,
going from s to t:

    predictor:  x_t = sigma_t/sigma_s * x_s - alpha_t*phi * (m_s + D/2)
    corrector:  x_t = sigma_t/sigma_s * x_s - alpha_t*phi * (m_s + rho_0*D + rho_1*(m_t - m_s))
    with        D = (m_r - m_s) / r,  r = (lambda_r - lambda_s) / h < 0

where m_* are predictions of the clean latents, m_r the one before m_s; at order 1 there is no D,
and rho_1 = 1/2. m_t comes from the latents *before* correction and is kept in that form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sgl_diffusion.components.samplers.options import check_options, unsupported
from sgl_diffusion.components.samplers.schedule import Array, Spacing, unipc_schedule
from sgl_diffusion.components.samplers.solver import COLUMNS, Solver

NAME = "UniPCMultistepScheduler"
SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "solver_order": (2, 1),
    "solver_type": ("bh2",),
    "predict_x0": (True,),
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "thresholding": (False,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
}
# What the scheduler class does when a config leaves the option out.
DEFAULTS: Mapping[str, Any] = {"prediction_type": "epsilon", "use_flow_sigmas": False}


def build(
    config: Mapping[str, Any],
    steps: int,
    flow_shift: float | None,
    spacing: Spacing,
    start: int,
) -> Solver:
    """The table for a UniPCMultistepScheduler's config."""
    check_options(NAME, config, SUPPORTED, DEFAULTS)
    if spacing != Spacing():
        raise unsupported(f"{NAME} with a schedule of the family's own is not supported.")
    shift = float(config.get("flow_shift", 1.0) if flow_shift is None else flow_shift)
    sigmas, timesteps = unipc_schedule(steps, shift, int(config.get("num_train_timesteps", 1000)))
    order_cap = int(config.get("solver_order", 2))
    # Order 1 at both ends: no history at the first step, no second sigma to lean on at the last.
    orders = [min(order_cap, steps - i, max(i - start, 0) + 1) for i in range(steps)]
    table = np.zeros((steps, len(COLUMNS)))
    for i in range(steps):
        row = {"sigma": float(sigmas[i])}
        row |= _corrector(sigmas, i, orders[i - 1]) if i > start else {"c_x": 1.0}
        row |= _predictor(sigmas, i, orders[i])
        for name, value in row.items():
            table[i, COLUMNS.index(name)] = value
    return Solver(torch.from_numpy(timesteps), torch.from_numpy(table).float(), start)


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma) if sigma else math.inf


def _predictor(sigmas: Array, i: int, order: int) -> dict[str, float]:
    """From sigma i to sigma i+1."""
    s, t = float(sigmas[i]), float(sigmas[i + 1])
    h = _log_snr(t) - _log_snr(s)
    pull = -(1 - t) * math.expm1(-h)
    if order == 1:
        return {"p_x": t / s, "p_x0": pull}
    r = (_log_snr(float(sigmas[i - 1])) - _log_snr(s)) / h
    return {"p_x": t / s, "p_x0": pull * (1 - 0.5 / r), "p_m0": pull * 0.5 / r}


def _corrector(sigmas: Array, i: int, order: int) -> dict[str, float]:
    """From sigma i-1 to sigma i, with the order the predictor of step i-1 had."""
    s, t = float(sigmas[i - 1]), float(sigmas[i])
    h = _log_snr(t) - _log_snr(s)
    phi = math.expm1(-h)
    pull = -(1 - t) * phi
    if order == 1:
        return {"c_last": t / s, "c_m0": pull * 0.5, "c_x0": pull * 0.5}
    r = (_log_snr(float(sigmas[i - 2])) - _log_snr(s)) / h
    phi_2 = phi / -h - 1
    phi_3 = phi_2 / -h - 0.5
    # rho_0 + rho_1 = phi_2/phi and r*rho_0 + rho_1 = 2*phi_3/phi
    rho_0 = (phi_2 - 2 * phi_3) / phi / (1 - r)
    rho_1 = phi_2 / phi - rho_0
    return {
        "c_last": t / s,
        "c_m0": pull * (1 - rho_0 / r - rho_1),
        "c_m1": pull * rho_0 / r,
        "c_x0": pull * rho_1,
    }
