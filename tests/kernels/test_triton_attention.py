"""The Triton attention compiled for GPUs: matrix instructions, loads, no spills; its settings."""

from __future__ import annotations

import pytest

from sgl_diffusion.ops import triton_impl

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(triton_impl.absent()), reason=triton_impl.absent() or "here")

# wgmma, tcgen05 and mma as they are called in SASS, and what loads tiles.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TILES = {80: "LDGSTS", 90: "UTMALDG", 100: "UTMALDG"}


@pytest.mark.parametrize("sm", MATRIX)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("varlen", [False, True])
def test_shipped_configurations(sm: int, dim: int, varlen: bool) -> None:
    from sgl_diffusion.kernels.attention import _attention_kernel
    from sgl_diffusion.kernels.settings import attention_blocks
    from tests.kernels.compiled import compile_for, spills

    blocks = attention_blocks(sm, dim)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    types |= {"lse_ptr": "*fp32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "qk_scale": "fp32"}
    constants = {"VARLEN": varlen, "LSE": True, "IEEE": False, "TMA": blocks.tma, "DIM": dim}
    constants |= {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "STAGES": blocks.stages}
    if not varlen:
        constants |= {"cu_q_ptr": None, "cu_k_ptr": None}
    compiled = compile_for(
        sm,
        _attention_kernel,
        types,
        constants,
        unaligned=("queries", "keys", "heads", "lse_batch", "lse_head"),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    sass = compiled.asm["sass"]
    assert MATRIX[sm] in sass and TILES[sm] in sass
    assert not spills(compiled)


@pytest.mark.parametrize("dim", [64, 128])
def test_merge_compiles(dim: int) -> None:
    from sgl_diffusion.kernels.attention import _attention_merge_kernel
    from tests.kernels.compiled import compile_for, spills

    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("lse_a_ptr", "lse_b_ptr", "lse_ptr"), "*fp32")
    constants = {"DIM": dim, "WIDE": dim, "BLOCK": 2048 // dim}
    for sm in MATRIX:
        compiled = compile_for(
            sm, _attention_merge_kernel, types, constants, unaligned=("rows", "tokens", "heads")
        )
        assert "ld.global.v4.b32" in compiled.asm["ptx"] and not spills(compiled)


def test_settings() -> None:
    from sgl_diffusion.kernels.settings import attention_blocks, attention_space

    assert attention_blocks(90, 128).tma and not attention_blocks(86, 64).tma
    assert attention_blocks(120, 64) == attention_blocks(100, 64)
    assert attention_blocks(90, 16) == attention_blocks(90, 64)
    for sm in MATRIX:
        for dim in (64, 128):
            space = list(attention_space(sm, dim))
            assert attention_blocks(sm, dim) in space and len(set(space)) == len(space)
            assert any(blocks.tma for blocks in space) == (sm >= 90)
