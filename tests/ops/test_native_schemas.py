"""How torch sees the native memory-bound ops: schemas, tracing, and errors at the boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sgl_diffusion import ops
from sgl_diffusion.ops import library

pytestmark = pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")


def _arguments() -> dict[str, tuple[Any, ...]]:
    x, y = torch.randn(2, 2, 3, 8).bfloat16()
    rows = torch.randn(2, 8)
    q, k = torch.randn(2, 1, 5, 2, 4)
    angles = torch.rand(5, 2)
    state, table = torch.randn(2, 7), torch.randn(2, 9)
    new = torch.empty_like
    fp8, scales = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(2, 3)
    return {
        "gate_residual": (x, y, rows, new(x)),
        "gate_residual_norm_modulate": (
            *(x, y, rows, rows, rows, None, None, 1e-6, False),
            *(new(x), new(x)),
        ),
        "qk_norm_rope": (
            *(q, k, torch.ones(8), None, angles, angles, 1e-6, False, False),
            *(new(q), new(k)),
        ),
        "gelu_tanh": (x, new(x)),
        "silu_mul": (x, y, new(x)),
        "cfg_combine_step": (
            *(state, state, state, torch.ones(2), table, state, state, state),
            *(new(state), new(state), new(state)),
        ),
        "quant_fp8_rowwise": (x, fp8, scales),
    }


@pytest.mark.parametrize("name", list(_arguments()))
def test_torch_accepts_the_native_op(name: str) -> None:
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "quant_fp8_rowwise":
        utils.remove("test_schema")  # it compares with arithmetic that torch lacks for fp8
    op = getattr(torch.ops.sgld, name).default
    torch.library.opcheck(op, _arguments()[name], test_utils=utils)


def _calls() -> dict[str, Callable[[Tensor], Any]]:
    gate = torch.randn(2, 8)

    def rope_in_place(x: Tensor) -> Tensor:
        qkv = x.repeat(1, 1, 3)
        q, k, _ = (part.unflatten(-1, (2, 4)) for part in qkv.chunk(3, dim=-1))
        ops.qk_norm_rope_(q, k, torch.ones(8), torch.ones(8))
        return qkv

    def activation_in_place(x: Tensor) -> Tensor:
        hidden = x * 2
        return ops.gelu_tanh(hidden, out=hidden)

    return {
        "gate_residual": lambda x: ops.gate_residual(x, x, gate),
        "gate_residual_norm_modulate": lambda x: ops.gate_residual_norm_modulate(x, x, gate),
        "qk_norm_rope": rope_in_place,
        "gelu_tanh": activation_in_place,
        "silu_mul": lambda x: ops.silu_mul(x, x),
        "quant_fp8_rowwise": lambda x: ops.quant_fp8_rowwise(x)[1],
        "cfg_combine_step": lambda x: ops.cfg_combine_step(
            x, x, x * 2, torch.ones(2), torch.ones(2, 9), x, x, x
        )[0],
        "attention_merge": lambda x: ops.attention_merge(
            x[None], torch.ones(1, 3, 2), x[None] * 2, torch.zeros(1, 3, 2)
        )[0],
    }


@pytest.mark.parametrize("name", list(_calls()))
def test_calls_are_traced_into_one_graph(name: str) -> None:
    call = _calls()[name]
    x = torch.randn(2, 3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x.sin()), fullgraph=True, backend="aot_eager")
    got, want = compiled(x), call(x.sin())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
    for one, real in zip(torch.utils._pytree.tree_leaves(fake), [want], strict=False):
        assert one.shape == (real[0] if isinstance(real, tuple) else real).shape


def test_wrong_sizes_are_named_in_the_native_ops() -> None:
    x, q, table = torch.randn(2, 3, 8), torch.randn(1, 5, 2, 4), torch.randn(2, 9)
    new = torch.empty_like
    calls = torch.ops.sgld
    for call, message in (
        (lambda: calls.gate_residual(x, x[:1], None, new(x)), "y .* where B is 2"),
        (lambda: calls.gate_residual(x, x, torch.ones(7), new(x)), "gate .* where D is 8"),
        (lambda: calls.gate_residual(x, x, None, new(x).double()), "must be float32, bfloat16"),
        (lambda: calls.gelu_tanh(x, new(x)[..., :7]), "result .* where D is 8"),
        (lambda: calls.gelu_tanh(x, new(x).half()), "another dtype"),
        (lambda: calls.silu_mul(x, x[:, :2], new(x)), "up .* where S is 3"),
        (
            lambda: calls.qk_norm_rope(
                q, q, torch.ones(7), None, None, None, 1e-6, False, False, new(q), new(q)
            ),
            r"weight .* where H\*d is 8",
        ),
        (
            lambda: calls.qk_norm_rope(
                q,
                q,
                None,
                None,
                q[0, :4, 0, :2],
                q[0, :4, 0, :2],
                0.0,
                False,
                False,
                new(q),
                new(q),
            ),
            "cos .* where S is 5",
        ),
        (
            lambda: calls.cfg_combine_step(
                *(x, x, None, None, table[:, :8].clone(), x, x, x, new(x), new(x), new(x))
            ),
            "table .* where the number of columns is 9",
        ),
        (lambda: calls.quant_fp8_rowwise(x, new(x), torch.empty(2, 3)), "float8_e4m3fn"),
        (
            lambda: calls.quant_fp8_rowwise(
                x, torch.empty(2, 3, 8, dtype=torch.float8_e4m3fn), torch.empty(5)
            ),
            "one for each row",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
