"""cfg_combine_step: classifier-free guidance and a linear solver's update, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ops import library, triton_elementwise, triton_impl
from sgl_diffusion.ops.buffers import room
from sgl_diffusion.ops.dispatch import FLOATS, Implementation, Op
from sgl_diffusion.ops.triton_register import implementation

States = tuple[Tensor, Tensor, Tensor, Tensor]
TABLE_COLUMNS = 9


def _truth(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    table: Tensor,
    last: Tensor,
    m0: Tensor,
    m1: Tensor,
) -> States:
    shape = (-1,) + (1,) * (x.dim() - 1)
    sigma, c_x, c_last, c_m0, c_m1, c_x0, p_x, p_x0, p_m0 = (
        column.reshape(shape) for column in table.unbind(1)
    )
    v = v_cond.float()
    if v_uncond is not None and guidance is not None:
        # In fp32: a scale of 7.3 is 7.3125 in bf16, and guidance multiplies what was rounded off.
        v = v_uncond.float() + guidance.reshape(shape) * (v - v_uncond.float())
    x0 = x - sigma * v
    corrected = c_x * x + c_last * last + c_m0 * m0 + c_m1 * m1 + c_x0 * x0
    return p_x * corrected + p_x0 * x0 + p_m0 * m0, corrected, x0, m0


def _native(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    table: Tensor,
    last: Tensor,
    m0: Tensor,
    m1: Tensor,
) -> States:
    following, corrected, x0 = room(x), room(x), room(x)
    torch.ops.sgld.cfg_combine_step.default(
        x, v_cond, v_uncond, guidance, table, last, m0, m1, following, corrected, x0
    )
    return following, corrected, x0, m0


def _refuses(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    table: Tensor,
    last: Tensor,
    m0: Tensor,
    m1: Tensor,
) -> str:
    for v in (v_cond, v_uncond):
        if v is not None and (v.dtype not in FLOATS or v.dtype != v_cond.dtype):
            return f"a velocity of {v.dtype}"
    for part in (x, v_cond, v_uncond, guidance, table, last, m0, m1):
        if part is not None and not part.is_contiguous():
            return "tensors that are not contiguous"
    return ""


def _triton_refuses(x: Tensor, *rest: Any) -> str:
    wide = x.dtype != torch.float32 and f"a state of {x.dtype}"
    return wide or _refuses(x, *rest) or triton_impl.refuses(rest[0])


library.fake("cfg_combine_step")(lambda *args: None)

_cfg_combine_step = Op(
    "cfg_combine_step",
    _truth,
    Implementation(
        "cpu",
        _native,
        ("cpu",),
        dtypes=(torch.float32,),
        absent=library.absent,
        refuses=_refuses,
    ),
    implementation(triton_elementwise.cfg_combine_step, _triton_refuses),
)


def cfg_combine_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    table: Tensor,
    last: Tensor,
    m0: Tensor,
    m1: Tensor,
) -> States:
    """Guide the velocity and advance a batch of solver states by one step; all of it in fp32.

    x [B, ...] and the history last, m0, m1 of its shape are fp32; v_cond and v_uncond of that
    shape may have any dtype; guidance [B] and table [B, 9] are fp32, the columns sigma, c_x,
    c_last, c_m0, c_m1, c_x0, p_x, p_x0, p_m0. v_uncond and guidance are None without guidance.

        v         = v_uncond + guidance * (v_cond - v_uncond)
        x0        = x - sigma * v
        corrected = c_x * x + c_last * last + c_m0 * m0 + c_m1 * m1 + c_x0 * x0
        next      = p_x * corrected + p_x0 * x0 + p_m0 * m0

    Returns the next (x, last, m0, m1), which is (next, corrected, x0, m0); m1 is the given m0.
    """
    assert (v_uncond is None) == (guidance is None), "v_uncond and guidance come together"
    assert table.shape == (x.shape[0], TABLE_COLUMNS), (
        f"table {tuple(table.shape)} must be [B, {TABLE_COLUMNS}] of x {tuple(x.shape)}"
    )
    for part in (x, last, m0, m1):
        assert part.shape == x.shape and part.dtype == torch.float32, (
            f"the solver state must be fp32 {tuple(x.shape)}, not {part.dtype} {tuple(part.shape)}"
        )
    for v in (v_cond, v_uncond):
        assert v is None or v.shape == x.shape, f"velocity {tuple(v.shape)}, x {tuple(x.shape)}"
    assert guidance is None or guidance.shape == x.shape[:1], f"guidance {tuple(guidance.shape)}"
    return _cfg_combine_step(x, v_cond, v_uncond, guidance, table, last, m0, m1)
