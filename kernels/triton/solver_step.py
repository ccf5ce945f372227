"""cfg_combine_step: guidance and a linear solver's update of every row of a batch, in one pass.

fp32 inside. A program takes one block of one row; the nine coefficients of the row and its guidance
are scalars, so rows at different steps and orders share a launch.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from .settings import FLAT_BLOCK

_COLUMNS = tl.constexpr(9)


@triton.jit
def _cfg_combine_step_kernel(
    x_ptr,
    cond_ptr,
    uncond_ptr,
    guidance_ptr,
    table_ptr,
    last_ptr,
    m0_ptr,
    m1_ptr,
    next_ptr,
    corrected_ptr,
    x0_ptr,
    width,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    at = row * width + lane
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    v = tl.load(cond_ptr + at, mask=inside, other=0.0).to(tl.float32)
    last = tl.load(last_ptr + at, mask=inside, other=0.0)
    m0 = tl.load(m0_ptr + at, mask=inside, other=0.0)
    m1 = tl.load(m1_ptr + at, mask=inside, other=0.0)
    if GUIDED:
        u = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = u + tl.load(guidance_ptr + row) * (v - u)
    table = table_ptr + row * _COLUMNS
    x0 = x - tl.load(table) * v
    corrected = tl.load(table + 1) * x + tl.load(table + 2) * last + tl.load(table + 3) * m0
    corrected += tl.load(table + 4) * m1 + tl.load(table + 5) * x0
    following = tl.load(table + 6) * corrected + tl.load(table + 7) * x0
    following += tl.load(table + 8) * m0
    tl.store(next_ptr + at, following, mask=inside)
    tl.store(corrected_ptr + at, corrected, mask=inside)
    tl.store(x0_ptr + at, x0, mask=inside)


def cfg_combine_step_launch(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    table: Tensor,
    last: Tensor,
    m0: Tensor,
    m1: Tensor,
    following: Tensor,
    corrected: Tensor,
    x0: Tensor,
) -> None:
    """All contiguous; the last three are the results."""
    if x.numel() == 0:
        return
    rows = x.shape[0]
    width = x.numel() // rows
    guided = v_uncond is not None
    _cfg_combine_step_kernel[(triton.cdiv(width, FLAT_BLOCK), rows)](
        x,
        v_cond,
        v_uncond if guided else v_cond,
        guidance if guided else table,
        table,
        last,
        m0,
        m1,
        following,
        corrected,
        x0,
        width,
        GUIDED=guided,
        BLOCK=FLAT_BLOCK,
        num_warps=4,
    )
