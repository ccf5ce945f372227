"""Counters and gauges of a worker, sent with every heartbeat and shown by the server's /metrics."""

from __future__ import annotations

from collections import defaultdict

from sgl_diffusion.orchestrator.messages import Metric


class Counters:
    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._gauges: set[str] = set()

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._values[name, tuple(sorted(labels.items()))] += value

    def set(self, name: str, value: float, **labels: str) -> None:
        """How a gauge stands now."""
        self._gauges.add(name)
        self._values[name, tuple(sorted(labels.items()))] = value

    def clear(self) -> None:
        self._values.clear()

    def metrics(self) -> list[Metric]:
        return [
            Metric(
                name=name,
                value=value,
                labels=dict(labels),
                kind="gauge" if name in self._gauges else "counter",
            )
            for (name, labels), value in list(self._values.items())
        ]
