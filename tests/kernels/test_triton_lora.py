"""The Triton LoRA kernels compiled for GPUs: matrix instructions, wide loads, no spills."""

from __future__ import annotations

import pytest

from sgl_diffusion.ops import triton_impl

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(triton_impl.absent()), reason=triton_impl.absent() or "here")

SM = pytest.mark.parametrize("sm", [80, 90, 100])


@SM
@pytest.mark.parametrize(("merge", "keep"), [(True, True), (True, False), (False, True)])
def test_merge_and_unmerge_compile(sm: int, merge: bool, keep: bool) -> None:
    import triton.language as tl

    from sgl_diffusion.kernels.lora import _lora_kernel
    from sgl_diffusion.kernels.settings import LORA
    from tests.kernels.compiled import compile_for, spills

    types = {"matrices_ptr": "*i64", "parts_ptr": "*i64", "scales_ptr": "*fp32"}
    types |= {"owner_ptr": "*i32", "codes_ptr": "*u8", "merged_ptr": "*u8"}
    types |= {"escape_ptr": "*i64", "escapes_ptr": "*i32"}
    constants = {"WEIGHT": tl.bfloat16, "KIND": tl.bfloat16, "MERGE": merge, "KEEP": keep}
    constants |= {"WIDE": False, "ALIGNED": True, "IEEE": False}
    constants |= {"M": LORA.m, "N": LORA.n, "RANK": LORA.rank}
    compiled = compile_for(
        sm,
        _lora_kernel,
        types,
        constants,
        unaligned=("tiles",),
        num_warps=LORA.warps,
        num_stages=LORA.stages,
        enable_fp_fusion=False,
    )
    ptx, sass = compiled.asm["ptx"], compiled.asm["sass"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    assert "MMA" in sass and not spills(compiled)
    assert "fma.rn.f32" not in ptx, "merge and unmerge must round alike"


@SM
@pytest.mark.parametrize("wide", [False, True], ids=["up bf16", "up fp32"])
def test_apply_compiles(sm: int, wide: bool) -> None:
    """Also within the shared memory that a block may have."""
    from sgl_diffusion.kernels.lora_apply import _expand_kernel, _shrink_kernel
    from sgl_diffusion.kernels.settings import LORA_APPLY as blocks
    from tests.kernels.compiled import compile_for, spills

    types = dict.fromkeys(("x_ptr", "a_ptr", "b_ptr", "y_ptr"), "*bf16")
    types |= {"index_ptr": "*i32", "h_ptr": "*fp32", "scales_ptr": "*fp32"}
    if wide:
        types |= {"b_ptr": "*fp32", "scales_ptr": "*bf16"}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    unaligned = ("tokens", "tiles", "adapters")
    for rank in (16, 64, blocks.most_rank):
        common = {"IEEE": False, "RANK": rank}
        shrink = common | {"M": blocks.shrink_m, "K": blocks.shrink_k}
        expand = common | {"M": blocks.expand_m, "N": blocks.expand_n, "SCALED": not wide}
        kernels = [(_expand_kernel, expand)] + [(_shrink_kernel, shrink)] * (not wide)
        for kernel, constants in kernels:
            compiled = compile_for(sm, kernel, types, constants, unaligned=unaligned, **options)
            assert "MMA" in compiled.asm["sass"] and not spills(compiled), (rank, kernel)
            assert compiled.metadata.shared <= {80: 163, 90: 227, 100: 227}[sm] * 1024


def test_room_for_escapes_keeps_five_bits() -> None:
    from sgl_diffusion.kernels.settings import escape_room

    count = 4096 * 4096
    assert (count * 4 + escape_room(count) * 64) / count < 5.01
