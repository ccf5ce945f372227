"""How much memory there is for a model and its jobs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

_KEPT_FREE = 0.05  # for what neither the estimates nor the system count
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)i?b?", re.IGNORECASE)
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take on this device; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    known = [value for value in (_machine(_MEMINFO), _group(_CGROUP)) if value is not None]
    return min(known, default=None)


def check_budget(option: str | None) -> float | None:
    """Bytes, or below 1 a share; raises for what is neither."""
    if option is None:
        return None
    found = _BUDGET.fullmatch(option.strip())
    size = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not 0 < size < math.inf:
        raise ConfigError(
            f"memory_budget is {option!r}.",
            hint="Give a size such as 8g or 6000m, or a share of the free memory such as 0.5.",
            param="memory_budget",
        )
    return size


def memory_budget(option: str | None, device: torch.device) -> int | None:
    """Bytes that a worker may take of the device, the model included; None where nobody knows.

    `option` is a size such as 8g, or below 1 a share of what is free.
    """
    free = free_memory(device)
    size = check_budget(option)
    if size is None:
        return None if free is None else int(free * (1 - _KEPT_FREE))
    if size >= 1:
        return int(size) if free is None else min(int(size), free)
    if free is None:
        raise ConfigError(
            "memory_budget is a share, and the system does not tell how much memory is free.",
            hint="Give a size such as 8g.",
            param="memory_budget",
        )
    return int(free * size)


def _machine(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(value) * 1024 for value in found), None)


def _group(folder: Path) -> int | None:
    """What the container's limit leaves; pages of files in use are given back when needed."""
    try:
        most = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if most == "max" else int(most) - used + int(stat.get("file", 0))
    except (OSError, ValueError):
        return None
