"""cfg_combine_step in float64."""

from __future__ import annotations

from torch import Tensor


def cfg_combine_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    table: Tensor,
    last: Tensor,
    m0: Tensor,
    m1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigma, c_x, c_last, c_m0, c_m1, c_x0, p_x, p_x0, p_m0 = (
        table[:, i].double().view(-1, *[1] * (x.ndim - 1)) for i in range(9)
    )
    x, last, m0, m1, v = (t.double() for t in (x, last, m0, m1, v_cond))
    if v_uncond is not None and guidance is not None:
        u, scale = v_uncond.double(), guidance.double().view(sigma.shape)
        v = u + scale * (v - u)
    x0 = x - sigma * v
    corrected = c_x * x + c_last * last + c_m0 * m0 + c_m1 * m1 + c_x0 * x0
    return p_x * corrected + p_x0 * x0 + p_m0 * m0, corrected, x0, m0
