"""Values of the memory-bound Triton kernels; `test_ops.py` runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.kernels.elementwise import (
    gate_residual_launch,
    gelu_tanh_launch,
    silu_mul_launch,
)
from sgl_diffusion.kernels.gate_norm import gate_residual_norm_modulate_launch
from sgl_diffusion.kernels.qk_norm_rope import qk_norm_rope_launch
from sgl_diffusion.kernels.quant import quant_fp8_rowwise_launch
from sgl_diffusion.kernels.solver_step import cfg_combine_step_launch
from tests.kernels import interpreter
from tests.refs import elementwise
from tests.refs.norm_modulate import norm_modulate
from tests.refs.qk_norm_rope import norm_rope
from tests.refs.solver_step import cfg_combine_step

assert interpreter, "run this file with TRITON_INTERPRET=1"

LIMIT = {torch.float32: 1e-5, torch.float16: 2.0**-10}
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=LIMIT[dtype], atol=LIMIT[dtype])


@DTYPES
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 1), None),
        ((5, 7), (5, 7)),
        ((2, 3, 40), (2, 40)),
        ((2, 3, 128), (2, 1, 128)),
        ((1, 2, 5120), (1, 2, 5120)),
        ((2, 2, 3, 24), None),
        ((2, 0, 8), (2, 8)),
    ],
)
def test_gate_residual(
    shape: tuple[int, ...], rows: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    x, y = torch.randn(2, *shape).to(dtype).unbind()
    gate = None if rows is None else torch.randn(rows)
    got = torch.empty_like(x)
    gate_residual_launch(x, y, gate, got)
    close(got, elementwise.gate_residual(x, y, gate), dtype)


@DTYPES
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 1), None),
        ((5, 7), (5, 7)),
        ((2, 3, 40), (2, 40)),
        ((2, 3, 1536), (2, 3, 1536)),
        ((1, 2, 5120), (1, 1, 5120)),
        ((2, 2, 3, 24), None),
    ],
)
def test_gate_residual_norm_modulate(
    shape: tuple[int, ...], rows: tuple[int, ...] | None, dtype: torch.dtype, rms: bool
) -> None:
    x, y = torch.randn(2, *shape).to(dtype).unbind()
    x = x * 2 + 1
    given: dict[str, Any] = {
        name: None if rows is None else torch.randn(rows) for name in ("scale", "shift")
    }
    given |= {name: torch.randn(shape[-1]).half() for name in ("weight", "bias")}
    gate = None if rows is None else torch.randn(rows)
    residual, out = torch.empty_like(x), torch.empty_like(x)
    gate_residual_norm_modulate_launch(
        x, y, gate, **given, eps=1e-5, rms=rms, residual=residual, out=out
    )
    close(residual, elementwise.gate_residual(x, y, gate), dtype)
    want = norm_modulate(residual, **given, eps=1e-5, kind="rms" if rms else "layer")
    close(out, want, dtype)


def test_gate_residual_norm_modulate_strided_and_empty() -> None:
    x, y = torch.randn(2, 5, 3, 40).unbind(2)[:2]
    gate, scale, shift = torch.randn(2, 5, 6, 40).unbind(2)[1:4]
    residual, out = torch.empty(x.shape), torch.empty(x.shape).half()
    rest = (gate, scale, shift, None, None, 1e-6, False, residual, out)
    gate_residual_norm_modulate_launch(x, y, *rest)
    close(residual, elementwise.gate_residual(x, y, gate), torch.float32)
    close(out, norm_modulate(residual, scale, shift), torch.float16)
    # The first result may replace an input.
    changed = x.contiguous()
    gate_residual_norm_modulate_launch(changed, y, *rest[:-2], changed, out)
    assert torch.equal(changed, residual)
    none = torch.empty(2, 0, 40)
    gate_residual_norm_modulate_launch(none, none, *[None] * 5, 1e-6, True, none, none)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 13, 3, 40), (2, 5, 2, 128), (1, 3, 12, 64)])
@pytest.mark.parametrize("in_place", [False, True])
def test_qk_norm_rope(
    shape: tuple[int, ...], full: bool, interleaved: bool, dtype: torch.dtype, in_place: bool
) -> None:
    batch, tokens, heads, dim = shape
    fused = torch.randn(batch, tokens, 3, heads, dim).to(dtype)
    q, k, v = fused.unbind(2)
    before = fused.clone()
    width = heads * dim if full else dim
    weights = torch.randn(2, width).to(dtype)
    angle = torch.rand(tokens, dim // 2) * 100
    cos, sin = angle.cos(), angle.sin()
    got = qk_norm_rope_launch(q, k, *weights, cos, sin, 1e-5, full, interleaved, in_place)
    given: dict[str, Any] = {
        "eps": 1e-5,
        "norm": "full" if full else "head",
        "rotary": "interleaved" if interleaved else "half",
    }
    for out, x, weight in zip(got, before.unbind(2), weights, strict=False):
        close(out, norm_rope(x, weight, cos, sin, **given), dtype)
    assert torch.equal(v, before[:, :, 2])
    assert (got[0].data_ptr() == q.data_ptr()) == in_place
    assert in_place or torch.equal(fused, before), "an input was changed"


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_qk_norm_rope_parts_can_be_left_out(full: bool, interleaved: bool) -> None:
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 5, 3, 8)
    weight_q, weight_k = torch.randn(32 if full else 8), torch.randn(24 if full else 8)
    given: dict[str, Any] = {
        "eps": 1e-6,
        "norm": "full" if full else "head",
        "rotary": "interleaved" if interleaved else "half",
    }
    got = qk_norm_rope_launch(q, k, weight_q, weight_k, None, None, 1e-6, full, interleaved)
    close(got[0], norm_rope(q, weight_q, None, None, **given), torch.float32)
    close(got[1], norm_rope(k, weight_k, None, None, **given), torch.float32)
    angle = torch.rand(9, 4)
    got = qk_norm_rope_launch(
        q, q[:, :, :2], None, None, angle.cos(), angle.sin(), 1e-6, full, interleaved
    )
    close(got[0], norm_rope(q, None, angle.cos(), angle.sin(), **given), torch.float32)
    want = norm_rope(q[:, :, :2], None, angle.cos(), angle.sin(), **given)
    close(got[1], want, torch.float32)


def _into(launch: Callable[..., None], *given: Tensor) -> Tensor:
    out = torch.empty(given[0].shape, dtype=given[0].dtype)
    launch(*given, out)
    return out


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (5, 123), (2, 3, 1536), (0, 4)])
def test_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 4).to(dtype)
    x[..., 0] = 60000.0  # the exponentials overflow here
    close(_into(gelu_tanh_launch, x), elementwise.gelu_tanh(x), dtype)
    up = torch.randn(shape).to(dtype)
    x[..., 0] = -200.0
    close(_into(silu_mul_launch, x, up), elementwise.silu_mul(x, up), dtype)


def test_silu_mul_of_a_fused_projection() -> None:
    gate, up = torch.randn(2, 7, 2 * 40).chunk(2, dim=-1)
    close(_into(silu_mul_launch, gate, up), elementwise.silu_mul(gate, up), torch.float32)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (2, 3, 1536), (0, 4)])
def test_quant_fp8_rowwise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 7).to(dtype)
    if x.shape[0] > 1:
        x[1] = 0.0
    value, scale = quant_fp8_rowwise_launch(x)
    assert value.dtype == torch.float8_e4m3fn and scale.shape == shape[:-1]
    if x.numel() == 0:
        return
    top = x.float().abs().amax(-1)
    torch.testing.assert_close(scale, (top / 448.0).clamp_min(2.0**-100))
    want = (x.float() * (1 / scale)[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    # The interpreter loses the carry of a mantissa that rounds up to the next power of two; a GPU
    # does not (tests/gpu compares every value).
    differ = value.view(torch.uint8) != want
    assert torch.all((want[differ] & 7) == 0) and differ.float().mean() < 0.03


@DTYPES
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 5, 3, 11), (2, 1100), (0, 4)])
def test_cfg_combine_step(shape: tuple[int, ...], guided: bool, dtype: torch.dtype) -> None:
    x, last, m0, m1 = torch.randn(4, *shape)
    v, u = torch.randn(2, *shape).to(dtype)
    table, scale = torch.randn(shape[0], 9), 1 + 7 * torch.rand(shape[0])
    given = (x, v, u if guided else None, scale if guided else None, table, last, m0, m1)
    got = [torch.empty_like(x) for _ in range(3)]
    cfg_combine_step_launch(*given, *got)
    for one, want in zip(got, cfg_combine_step(*given), strict=False):
        torch.testing.assert_close(one.double(), want, rtol=2e-6, atol=2e-5)
