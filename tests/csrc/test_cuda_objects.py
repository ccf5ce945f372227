"""The CUDA kernels as compiled: the right architectures, 16-byte loads, no spills. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sgl_diffusion.ops import library

triton = pytest.importorskip("triton")
CUOBJDUMP = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")


def _dump(*options: str) -> str:
    command = [CUOBJDUMP, *options, library.path()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def _built_with_cuda() -> Iterator[None]:
    if library.absent():
        pytest.skip(library.absent())
    if not torch.ops.sgld.has_cuda():
        assert not shutil.which("nvcc"), "nvcc is installed, but the library has no CUDA kernels"
        pytest.skip("nvcc is not installed")
    yield


def test_architectures() -> None:
    # Newer versions of the tool print the "a" of sm_90a.
    assert set(re.findall(r"sm_\d+", _dump("-lelf"))) == {"sm_80", "sm_90", "sm_100"}
    ptx = set(re.findall(r"sm_\w+", _dump("-lptx")))
    assert ptx == {"sm_100"}, "PTX of the newest, for later GPUs"


# Kernels whose rows are read in 16-byte pieces, and how many instances an architecture has.
WIDE = {
    "norm_modulate_registers_kernel": 3 * 3,  # dtypes, items
    "gated_norm_registers_kernel": 3 * 2,
    "qk_norm_rope_kernel": 3 * 2,  # dtypes, rotations
    "lora_merge_kernel": 3,  # dtypes
    "lora_unmerge_kernel": 3,
}
STREAMED = {
    "norm_modulate_streamed_kernel": 3,
    "gated_norm_streamed_kernel": 3,
    "lora_sample_kernel": 3,  # reads a few panels
    "lora_count_kernel": 1,
    "lora_gather_kernel": 2,  # 16 and 32 bits
}
MATRIX = {"sm80_attention_kernel": 2}  # head dims
HOPPER = {"sm90_attention_kernel": 2}  # compiled for sm_90a only
ARCHITECTURES = 3


KERNELS = {name: count * ARCHITECTURES for name, count in (WIDE | STREAMED | MATRIX).items()}
KERNELS |= HOPPER


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[str]]:
    return _kernels()


def _kernels() -> dict[str, list[str]]:
    """The SASS of every instance of every kernel, by the kernel's name."""
    found: dict[str, list[str]] = {name: [] for name in KERNELS}
    for text in _dump("-sass").split("Function : ")[1:]:
        names = [name for name in found if name in text.split("\n", 1)[0]]
        assert len(names) == 1, f"a kernel without a check: {text.splitlines()[0]}"
        found[names[0]].append(text)
    return found


def test_sass_has_wide_loads_and_no_spills(kernels: dict[str, list[str]]) -> None:
    for name, instances in KERNELS.items():
        assert len(kernels[name]) == instances, name
        for text in kernels[name]:
            assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
    for name in WIDE:
        for text in kernels[name]:
            assert "LDG.E.128" in text and "STG.E.128" in text, f"{name} loads less than 16 bytes"
    for text in kernels["sm80_attention_kernel"]:
        for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.MT88.4", "LDSM.16.M88.4", "LDGSTS"):
            assert instruction in text, f"attention lacks {instruction}"


def test_sm90_attention_is_made_of_copies_and_products_of_warpgroups(
    kernels: dict[str, list[str]],
) -> None:
    """Products are 16 deep: two of scores and two of values, before, in and after the loop."""
    for text in kernels["sm90_attention_kernel"]:
        dim, keys = (128, 176) if "ILi128E" in text.split("\n", 1)[0] else (64, 128)
        products = re.findall(r"\bHGMMA\.64x(\d+)x16\.F32\.BF16\b", text)
        assert products.count(str(keys)) == 2 * dim // 16
        assert products.count(str(dim)) == (2 * keys // 16 if dim != keys else 0)
        assert not re.search(r"\bHMMA\b", text), "products of single warps"
        assert len(re.findall(r"\bUTMALDG\.4D\b", text)) == 3 * dim // 64
        assert len(re.findall(r"\bUSETMAXREG\b", text)) == 2
        assert "STG.E.128" in text and "STS" in text
        # Waits for products: the first scores; in the loop the scores, then the values; the last.
        # More of them would mean that the assembler found no way to run products side by side.
        parts = re.split(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text)
        assert parts[1::2] == ["0", "1", "0", "0"]
        softmax = parts[4]
        assert softmax.count("MUFU.EX2") > keys // 2, "the softmax runs beside the values' product"
        # Ping-pong: the turn is waited for and passed on.
        assert "BAR.SYNC" in text and "BAR.ARV" in text


def test_lora_has_only_the_fused_operations_that_it_asks_for(
    kernels: dict[str, list[str]],
) -> None:
    """A product and a sum that the compiler fused would give other bits than a CPU."""
    for name in ("lora_merge_kernel", "lora_unmerge_kernel"):
        for text in kernels[name]:
            assert "FFMA.FTZ" in text and "LDS.128" in text
            plain = set(re.findall(r"\bFFMA(?!\.FTZ)[\w.]*", text))
            # Of fp16 a product by a power of two, which is exact, may be fused.
            assert not plain or "3f16" in text.split("\n", 1)[0], name


def test_the_library_loads_without_cuda_torch() -> None:
    """The CUDA half is in the file, yet nothing of CUDA is needed to load it and run on the CPU."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    x = torch.randn(2, 8)
    got = torch.ops.sgld.norm_modulate(x, None, None, None, None, 1e-6, False, torch.float32)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
