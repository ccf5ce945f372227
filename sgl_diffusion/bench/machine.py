"""Who ran a benchmark, and the limits of that machine: what a copy and a multiplication reach."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.bench.timing import Work
from sgl_diffusion.ops import library

MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the matrices that are multiplied


def facts(device: str) -> dict[str, Any]:
    """The machine, for the result file."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "isa": "no native library" if library.absent() else str(torch.ops.sgld.cpu_isa()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def copy_of(tensor: torch.Tensor) -> Work:
    """A copy of a tensor into memory that is already there: the limit of a memory-bound op."""
    target = torch.empty_like(tensor)
    return lambda: target.copy_(tensor)


def product(device: str, dtype: torch.dtype) -> tuple[Work, float]:
    """torch's product of two random square matrices and its FLOP: zeros would be faster."""
    n = MATRIX[device]
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return lambda: a @ b, 2.0 * n**3
