"""The memory-bound Triton kernels compiled for GPUs, and every value test in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.ops import triton_impl

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(triton_impl.absent()), reason=triton_impl.absent() or "here")

SM = pytest.mark.parametrize("sm", [80, 90, 100])
WIDTHS = (5120, 8960)


@pytest.mark.parametrize("name", ["ops", "attention", pytest.param("lora", marks=pytest.mark.slow)])
def test_values_in_the_interpreter(name: str) -> None:
    """Triton decides at its import whether it interprets, so this takes a process of its own."""
    file = Path(__file__).with_name(f"interpreted_{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    least = {"ops": 144, "attention": 38, "lora": 24}[name]
    assert passed and int(passed[1]) == least and "skipped" not in done.stdout, done.stdout


def _check_memory_bound(compiled: Any, *, loads: str = "ld.global.v4.b32") -> None:
    from tests.kernels.compiled import spills

    assert not spills(compiled)
    assert loads in compiled.asm["ptx"], "loads are narrow"
    assert "st.global" in compiled.asm["ptx"]


@SM
@pytest.mark.parametrize("width", WIDTHS)
def test_gate_residual_norm_modulate_compiles(sm: int, width: int) -> None:
    from sgl_diffusion.kernels.gate_norm import _gate_residual_norm_modulate_kernel as kernel
    from sgl_diffusion.kernels.settings import held_blocks, num_warps
    from tests.kernels.compiled import compile_for

    block, blocks = held_blocks(width)
    types = dict.fromkeys(("x_ptr", "y_ptr", "sum_ptr", "out_ptr"), "*bf16") | {"eps": "fp32"}
    names = ("gate_ptr", "scale_ptr", "shift_ptr", "weight_ptr", "bias_ptr")
    types |= dict.fromkeys(names, "*fp32")
    flags = dict.fromkeys(("GATE", "SCALE", "SHIFT", "WEIGHT", "BIAS"), True)
    compiled = compile_for(
        sm,
        kernel,
        types,
        flags | {"RMS": False, "BLOCK": block, "BLOCKS": blocks},
        unaligned=("tokens",),
        num_warps=num_warps(block),
    )
    _check_memory_bound(compiled)
    assert "STG.E.128" in compiled.asm["sass"]


@SM
def test_gate_residual_compiles(sm: int) -> None:
    from sgl_diffusion.kernels.elementwise import _gate_residual_kernel as kernel
    from sgl_diffusion.kernels.settings import num_warps, row_blocks
    from tests.kernels.compiled import compile_for

    block, _ = row_blocks(5120)
    types = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), "*bf16") | {"gate_ptr": "*fp32"}
    constants = {"GATE": True, "BLOCK": block}
    compiled = compile_for(
        sm, kernel, types, constants, unaligned=("tokens",), num_warps=num_warps(block)
    )
    _check_memory_bound(compiled)


@SM
def test_activations_compile(sm: int) -> None:
    from sgl_diffusion.kernels.elementwise import _gelu_tanh_kernel, _silu_mul_kernel
    from sgl_diffusion.kernels.settings import FLAT_BLOCK, num_warps, row_blocks
    from tests.kernels.compiled import compile_for

    types = dict.fromkeys(("x_ptr", "gate_ptr", "up_ptr", "out_ptr"), "*bf16")
    gelu = compile_for(sm, _gelu_tanh_kernel, types, {"BLOCK": FLAT_BLOCK}, num_warps=4)
    _check_memory_bound(gelu)
    block, _ = row_blocks(8960)
    silu = compile_for(sm, _silu_mul_kernel, types, {"BLOCK": block}, num_warps=num_warps(block))
    _check_memory_bound(silu)


@SM
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "full"), [(12, True), (40, True), (24, False)])
def test_qk_norm_rope_compiles(sm: int, heads: int, full: bool, interleaved: bool) -> None:
    from sgl_diffusion.kernels.qk_norm_rope import _qk_norm_rope_kernel as kernel
    from sgl_diffusion.kernels.settings import rope_blocks
    from tests.kernels.compiled import compile_for

    half, rows, warps = rope_blocks(heads, 128, full)
    tensors = ("q_ptr", "k_ptr", "weight_q_ptr", "weight_k_ptr", "out_q_ptr", "out_k_ptr")
    types = dict.fromkeys(tensors, "*bf16")
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32"}
    flags = dict.fromkeys(("WEIGHT_Q", "WEIGHT_K", "ROTATE"), True)
    constants = {"FULL": full, "INTERLEAVED": interleaved, "DIM": 128, "HALF": half}
    compiled = compile_for(
        sm,
        kernel,
        types,
        flags | constants | {"HEADS": rows},
        unaligned=("q_rows", "q_tokens", "k_tokens", "q_heads", "k_heads"),
        num_warps=warps,
    )
    _check_memory_bound(compiled)


@pytest.mark.parametrize("sm", [90, 100])  # float8_e4m3 came with sm_89
@pytest.mark.parametrize("width", WIDTHS)
def test_quant_fp8_rowwise_compiles(sm: int, width: int) -> None:
    from sgl_diffusion.kernels.quant import LARGEST, SMALLEST_SCALE
    from sgl_diffusion.kernels.quant import _quant_fp8_rowwise_kernel as kernel
    from sgl_diffusion.kernels.settings import held_blocks, num_warps
    from tests.kernels.compiled import compile_for

    block, blocks = held_blocks(width)
    types = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    constants = {"LARGEST": LARGEST, "SMALLEST": SMALLEST_SCALE, "BLOCK": block, "BLOCKS": blocks}
    compiled = compile_for(sm, kernel, types, constants, num_warps=num_warps(block))
    _check_memory_bound(compiled)


@SM
def test_cfg_combine_step_compiles(sm: int) -> None:
    from sgl_diffusion.kernels.settings import FLAT_BLOCK
    from sgl_diffusion.kernels.solver_step import _cfg_combine_step_kernel as kernel
    from tests.kernels.compiled import compile_for

    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"cond_ptr": "*bf16", "uncond_ptr": "*bf16"}
    compiled = compile_for(sm, kernel, types, {"GUIDED": True, "BLOCK": FLAT_BLOCK}, num_warps=4)
    _check_memory_bound(compiled)


def test_held_blocks() -> None:
    from sgl_diffusion.kernels.settings import held_blocks

    assert [held_blocks(w) for w in (40, 1536, 3072, 5120)] == [
        (64, 1),
        (512, 3),
        (1024, 3),
        (1024, 5),
    ]
    assert held_blocks(8960) == (2048, 5), "not 35 blocks of 256"
    assert held_blocks(50000) == (4096, 13)


def test_rope_blocks() -> None:
    from sgl_diffusion.kernels.settings import rope_blocks

    assert rope_blocks(1, 2, True) == (1, 1, 1)
    assert rope_blocks(40, 128, True) == (64, 64, 8), "all heads of a token"
    assert rope_blocks(40, 128, False) == (64, 32, 8)
    assert rope_blocks(3, 40, False) == (32, 4, 1)


def test_the_ops_run_the_named_interpreter() -> None:
    """Environment, dispatch, torch op and kernel of every op with a row, and the fakes."""
    code = """
import torch
from tests.kernels import interpreter
from sgl_diffusion import ops
from sgl_diffusion.ops import triton_attention, triton_elementwise, triton_lora, triton_rope
from torch._subclasses import FakeTensorMode
x, y, gate = torch.randn(2, 3, 40), torch.randn(2, 3, 40), torch.randn(2, 40)
q = torch.randn(2, 3, 4, 64)
state, table, packed = torch.randn(2, 7), torch.randn(2, 9), torch.tensor([0, 1, 2])
lse = q[..., 0].mT
weight, angle = torch.randn(64), torch.rand(3, 32)
calls = {
    "gate_residual": lambda: ops.gate_residual(x, y, gate),
    "gelu_tanh": lambda: ops.gelu_tanh(x),
    "silu_mul": lambda: ops.silu_mul(x, y),
    "qk_norm_rope": lambda: ops.qk_norm_rope(q, q, weight, weight, angle, angle, norm="head"),
    "attention": lambda: ops.attention(
        q[:, 0], q[:, 1], q[:, 2], lse=True, cu_seqlens_q=packed, cu_seqlens_k=packed
    ),
    "attention_merge": lambda: ops.attention_merge(q, lse, q, lse),
    "cfg_combine_step": lambda: ops.cfg_combine_step(
        state, state, state, weight[:2], table, state, state, state
    ),
}
for name, call in calls.items():
    with ops.using(**{name: "triton"}):
        got = call()
    torch.testing.assert_close(got, call(), rtol=1e-5, atol=1e-5)
    assert ops.counts()[name, "triton"] == 1
changed = q.clone()
none = changed[:, :, :0]
rest = (weight, None, angle, angle, 1e-6, "head", "half")
triton_rope.qk_norm_rope(changed, none, *rest, in_place=True)
want, _ = ops.qk_norm_rope(q, q, weight, None, angle, angle, norm="head", rotary="half")
torch.testing.assert_close(changed, want, rtol=1e-5, atol=1e-5)
index = torch.zeros(3, dtype=torch.int32)
row = lambda: (torch.zeros(3, 8), torch.ones(3, 40), torch.ones(1, 4, 40), torch.ones(1, 8, 4),
               torch.ones(1), index)
assert torch.equal(triton_lora.lora_apply_(*row()), torch.full((3, 8), 160.0))
parts = (None, gate, gate, None, None, 1e-6, "layer")
real = {
    "gate": lambda: triton_elementwise.gate_residual_norm_modulate(x, y, *parts),
    "quant": lambda: triton_elementwise.quant_fp8_rowwise(x),
    "attention": lambda: triton_attention.attention(q, q, q),
    "merge": lambda: triton_attention.attention_merge(q, q[..., 0].mT, q, q[..., 0].mT),
}
results = {name: call() for name, call in real.items()}
with FakeTensorMode() as mode:
    x, y, gate, q = (mode.from_tensor(part) for part in (x, y, gate, q))
    parts = (None, gate, gate, *parts[3:])
    for name, call in real.items():
        for fake, was in zip(call(), results[name], strict=True):
            assert fake.shape == was.shape and fake.dtype == was.dtype, name
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
