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
    assert re.findall(r"sm_\w+", _dump("-lptx")) == ["sm_100"], "PTX of the newest, for later GPUs"


def test_sass_has_wide_loads_and_no_spills() -> None:
    kernels = _dump("-sass").split("Function : ")[1:]
    wide = [text for text in kernels if "norm_modulate_registers_kernel" in text.split("\n", 1)[0]]
    assert len(wide) == 3 * 3 * 3, "dtypes, items and architectures"
    assert len(kernels) == len(wide) + 3 * 3, "one streamed kernel a dtype and architecture"
    for text in kernels:
        name = text.split("\n", 1)[0]
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
    for text in wide:
        name = text.split("\n", 1)[0]
        assert "LDG.E.128" in text and "STG.E.128" in text, f"{name} loads less than 16 bytes"
    # sm_90a, not sm_90: later kernels need its instructions.
    assert "sm_90a" in _dump("-sass")


def test_the_library_loads_without_cuda_torch() -> None:
    """The CUDA half is in the file, yet nothing of CUDA is needed to load it and run on the CPU."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    x = torch.randn(2, 8)
    got = torch.ops.sgld.norm_modulate(x, None, None, None, None, 1e-6, False, torch.float32)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
