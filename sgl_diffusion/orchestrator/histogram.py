"""Histograms of seconds, so that a dashboard can draw percentiles."""

from __future__ import annotations

from bisect import bisect_left

from sgl_diffusion.orchestrator.messages import Metric

# From a token of a small model to the longest time that a video may take.
BOUNDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(25.0, 60.0, 150.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0),
)  # fmt: skip


class Histogram:
    """One series for each value of its labels; values of labels are few."""

    def __init__(self, name: str, *labels: str) -> None:
        self._name = name
        self._labels = labels
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, seconds: float, *values: str) -> None:
        counts = self._counts.setdefault(values, [0] * (len(BOUNDS) + 1))
        counts[bisect_left(BOUNDS, seconds)] += 1
        self._sums[values] = self._sums.get(values, 0.0) + seconds

    def metrics(self) -> list[Metric]:
        """Each bucket counts what is at most its bound, with all smaller ones."""
        found = []
        for values, counts in self._counts.items():
            labels = dict(zip(self._labels, values, strict=True))
            below = 0
            for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True):
                below += count
                found.append(self._sample("bucket", below, {**labels, "le": str(bound)}))
            found.append(self._sample("sum", self._sums[values], labels))
            found.append(self._sample("count", below, labels))
        return found

    def _sample(self, part: str, value: float, labels: dict[str, str]) -> Metric:
        return Metric(f"{self._name}_{part}", value, labels, "histogram")
