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
}
STREAMED = {"norm_modulate_streamed_kernel": 3, "gated_norm_streamed_kernel": 3}
MATRIX = {"sm80_attention_kernel": 2}  # head dims
ARCHITECTURES = 3


def _kernels() -> dict[str, list[str]]:
    """The SASS of every instance of every kernel, by the kernel's name."""
    found: dict[str, list[str]] = {name: [] for name in (*WIDE, *STREAMED, *MATRIX)}
    for text in _dump("-sass").split("Function : ")[1:]:
        names = [name for name in found if name in text.split("\n", 1)[0]]
        assert len(names) == 1, f"a kernel without a check: {text.splitlines()[0]}"
        found[names[0]].append(text)
    return found


def test_sass_has_wide_loads_and_no_spills() -> None:
    kernels = _kernels()
    for name, instances in (WIDE | STREAMED | MATRIX).items():
        assert len(kernels[name]) == instances * ARCHITECTURES, name
        for text in kernels[name]:
            assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
    for name in WIDE:
        for text in kernels[name]:
            assert "LDG.E.128" in text and "STG.E.128" in text, f"{name} loads less than 16 bytes"
    for text in kernels["sm80_attention_kernel"]:
        for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.MT88.4", "LDSM.16.M88.4", "LDGSTS"):
            assert instruction in text, f"attention lacks {instruction}"
    # sm_90a, not sm_90: later kernels need its instructions.
    assert "sm_90a" in _dump("-sass")


def test_the_library_loads_without_cuda_torch() -> None:
    """The CUDA half is in the file, yet nothing of CUDA is needed to load it and run on the CPU."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    x = torch.randn(2, 8)
    got = torch.ops.sgld.norm_modulate(x, None, None, None, None, 1e-6, False, torch.float32)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
