"""A trace of one call of each work, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.bench.timing import Work


class Trace:
    """Every case is recorded by itself, so that building the next one is not in the picture."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._whole: dict[str, Any] = {}

    def add(self, label: str, works: dict[str, Work]) -> None:
        with torch.profiler.profile(activities=self._activities) as recorder:
            for name, work in works.items():
                with torch.profiler.record_function(f"{label}: {name}"):
                    work()
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            recorder.export_chrome_trace(str(part))
            found = json.loads(part.read_text())
        if self._whole:
            self._whole["traceEvents"] += found["traceEvents"]
        else:
            self._whole = found

    def save(self) -> None:
        self.path.write_text(json.dumps(self._whole))
