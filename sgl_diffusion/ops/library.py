"""The ops of the native library: there from the first op on that could use it.

They appear as `torch.ops.sgld.*`. A process without it computes with the torch truth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.base import env, native
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.native import path
from sgl_diffusion.base.registry import suggest

log = get_logger(__name__)

__all__ = [
    "CPU_ISAS",
    "absent",
    "fake",
    "path",
    "restore_cpu_isa",
    "without_cuda",
]

CPU_ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "scalar")

_lock = threading.RLock()
_absent: str | None = None
_fakes: dict[str, Callable[..., Any]] = {}


def absent() -> str:
    """Why the native library cannot be used in this process, or "" when it is loaded."""
    global _absent
    with _lock:
        if _absent is None:
            _absent = _load(path())
            if _absent == "":
                for name, function in _fakes.items():
                    torch.library.register_fake(f"sgld::{name}", function)
        return _absent


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a native op its shapes for tracing (torch.compile, FakeTensor)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        with _lock:
            _fakes[name] = function
            if _absent == "":
                torch.library.register_fake(f"sgld::{name}", function)
        return function

    return decorate


def without_cuda() -> str:
    """Why the CUDA kernels cannot be used in this process, or ""."""
    reason = absent()
    if not reason and not torch.ops.sgld.has_cuda():
        reason = "the native library was built without nvcc; build it where nvcc is installed"
    return reason


def _load(file: Path) -> str:
    """Load a file and cap its CPU kernels; the reason if it cannot. A named file must load."""
    reason = native.load(file)
    if not reason:
        _cap_cpu_isa(str(env.get("SGLD_CPU_ISA")))
        log.debug("native library %s, CPU kernels %s", file, torch.ops.sgld.cpu_isa())
    return reason


def restore_cpu_isa() -> None:
    """Cap the CPU kernels as SGLD_CPU_ISA says, after a cap of another kind."""
    _cap_cpu_isa(str(env.get("SGLD_CPU_ISA")))


def _cap_cpu_isa(level: str) -> None:
    if level and level not in CPU_ISAS:
        raise ConfigError(
            f"SGLD_CPU_ISA={level!r} is no CPU kernel level.", hint=suggest(level, CPU_ISAS)
        )
    torch.ops.sgld.cap_cpu_isa(level or CPU_ISAS[0])
