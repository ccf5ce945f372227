"""Counters of a worker, sent with every heartbeat and shown by the server's /metrics."""

from __future__ import annotations

from collections import defaultdict

from sgl_diffusion.orchestrator.messages import Metric


class Counters:
    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._values[name, tuple(sorted(labels.items()))] += value

    def clear(self) -> None:
        self._values.clear()

    def metrics(self) -> list[Metric]:
        return [
            Metric(name=name, value=value, labels=dict(labels))
            for (name, labels), value in self._values.items()
        ]
