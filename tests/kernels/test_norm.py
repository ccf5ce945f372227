"""The Triton norm_modulate: values in the interpreter, and compilation for GPUs without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_diffusion.ops import triton_impl

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(triton_impl.absent()), reason=triton_impl.absent() or "here")

FLAGS = ("RMS", "SCALE", "SHIFT", "WEIGHT", "BIAS")
POINTERS = ("x", "scale", "shift", "weight", "bias", "out")


def test_values_in_the_interpreter() -> None:
    """Triton decides at its import whether it interprets, so this takes a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            Path(__file__).with_name("interpreted_norm.py"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "29 passed" in done.stdout, done.stdout


def test_the_op_runs_the_named_interpreter() -> None:
    """The whole way: environment, dispatch, torch op, kernel; bfloat16 is refused, not wrong."""
    code = """
import torch
from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
x, s = torch.randn(2, 3, 40), torch.randn(2, 40)
got = ops.norm_modulate(x, s, s)
with ops.using(norm_modulate="torch"):
    torch.testing.assert_close(got, ops.norm_modulate(x, s, s))
assert ops.counts() == {("norm_modulate", "triton"): 1, ("norm_modulate", "torch"): 1}
try:
    ops.norm_modulate(x.bfloat16())
except ConfigError as error:
    print(error)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "SGLD_OPS": "norm_modulate=triton"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "interpreter computes bfloat16 wrongly" in done.stdout


@pytest.mark.parametrize(("width", "expected"), [(1, (16, 1)), (40, (64, 1)), (1024, (1024, 1))])
def test_narrow_rows_are_one_block(width: int, expected: tuple[int, int]) -> None:
    from sgl_diffusion.kernels.settings import row_blocks

    assert row_blocks(width) == expected


def test_wide_rows_waste_little() -> None:
    from sgl_diffusion.kernels.settings import num_warps, row_blocks

    for width in (1536, 2048, 3072, 4096, 5120, 6144, 8960):
        block, blocks = row_blocks(width)
        assert block * blocks == width and block & (block - 1) == 0, width
        assert 1 <= num_warps(block) <= 8
    block, blocks = row_blocks(1030)
    assert (blocks - 1) * block < 1030 <= blocks * block


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_compiles_for_a_gpu(sm: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sgl_diffusion.kernels.norm import _norm_modulate_kernel as kernel
    from sgl_diffusion.kernels.settings import num_warps, row_blocks

    block, blocks = row_blocks(5120)
    constants = dict.fromkeys(FLAGS, True) | {"RMS": False, "BLOCK": block, "BLOCKS": blocks}
    dtypes = {"x": "*bf16", "out": "*bf16"}
    signature = {f"{name}_ptr": dtypes.get(name, "*fp32") for name in POINTERS}
    for name in kernel.arg_names[len(POINTERS) :]:
        signature[name] = "constexpr" if name in constants else "i32"
    signature["eps"] = "fp32"
    # What the launcher finds out by itself: pointers and strides that are multiples of 16.
    aligned = [i for i, n in enumerate(kernel.arg_names) if n not in constants and n != "eps"]
    source = ASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options={"num_warps": num_warps(block)}
    )
    assert compiled.metadata.target.arch == sm
    assert "ld.global.v4.b32" in compiled.asm["ptx"], "loads are not 16 bytes wide"
    assert "st.global.v4.b32" in compiled.asm["ptx"]
    sass = compiled.asm["sass"]
    assert "LDG.E.128" in sass and "LDL" not in sass and "STL" not in sass
