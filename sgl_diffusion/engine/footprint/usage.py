"""What this worker really takes of its device's memory, and the most that a job took."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sgl_diffusion.base.footprint import Footprint
from sgl_diffusion.engine.job import Job
from sgl_diffusion.orchestrator.messages import Metric

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # see proc(5), clear_refs
_LEAST = 256 << 20  # bytes below which what the allocator holds back hides a job


def taken(device: torch.device) -> int:
    """Bytes this process takes now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def give_back() -> None:
    """Hand what was freed back to the system, as far as the C library knows how."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@dataclass
class _Watched:
    job: Job
    alone: bool


class Usage:
    """Follows the jobs of a worker. The peak of a job is that of the process while it ran; only
    what a job without company took is compared with what was foretold."""

    def __init__(self, device: torch.device, footprint: Footprint | None) -> None:
        self._device = device
        self._footprint = footprint
        self._base = taken(device)
        self._peak = peak_since(device)
        self._running: dict[str, _Watched] = {}
        self._ratio: float | None = None

    def begin(self, job: Job) -> None:
        if not self._running:
            self._peak = peak_since(self._device)
        for watched in self._running.values():
            watched.alone = False
        self._running[job.id] = _Watched(job, alone=not self._running)

    def end(self, job_id: str) -> int:
        """The job is over: the peak in bytes; 0 if it was none of those that began."""
        watched = self._running.pop(job_id, None)
        if watched is None:
            return 0
        peak = self._peak()
        if watched.alone and self._footprint is not None:
            foretold = self._footprint.job_bytes(watched.job.params)
            if foretold >= _LEAST:
                self._ratio = foretold / max(peak - self._base, 1)
        return peak

    def metrics(self) -> list[Metric]:
        found: dict[str, float] = {
            "memory_taken_bytes": taken(self._device),
            "memory_model_bytes": self._base,
        }
        if self._footprint is not None:
            found["memory_room_bytes"] = self._footprint.room
        if self._ratio is not None:
            found["memory_estimate_ratio"] = self._ratio
        return [Metric(name=name, value=value, kind="gauge") for name, value in found.items()]


def peak_since(device: torch.device) -> Callable[[], int]:
    """Forget the peak so far; the result tells the most bytes this process took since."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # not everywhere allowed: then it is the peak of all time
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    return lambda: _resident("VmHWM")


def _resident(field: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
