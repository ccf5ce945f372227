"""How long denoise steps take, by the size of what they make."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.counters import Counters

MOST_SIZES = 32  # told apart in the metrics; clients choose sizes, and every one is a series
OTHER = "other"
MIXED = "mixed"  # rows of different sizes in one step


class StepTimes:
    """Sums and counts under `step_seconds`, with the model and a size like 832x480x81."""

    def __init__(self, counters: Counters, model: str) -> None:
        self._counters = counters
        self._model = model
        self._sizes: set[str] = set()

    def add(self, rows: Sequence[ResolvedParams], seconds: float) -> None:
        sizes = {self._label(params) for params in rows}
        labels = {"model": self._model, "size": MIXED if len(sizes) > 1 else sizes.pop()}
        self._counters.add("step_seconds_sum", seconds, **labels)
        self._counters.add("step_seconds_count", 1, **labels)

    def _label(self, params: ResolvedParams) -> str:
        size = f"{params.width}x{params.height}"
        if params.num_frames > 1:
            size += f"x{params.num_frames}"
        if len(self._sizes) < MOST_SIZES:
            self._sizes.add(size)
        return size if size in self._sizes else OTHER
