"""Prometheus text, read strictly: one family a name, and histograms that are histograms."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]


@dataclass
class Series:
    """What a histogram has for one set of labels; `buckets` in the order of the text."""

    buckets: list[tuple[float, float]] = field(default_factory=list)
    sum: float = math.nan
    count: float = math.nan

    def check(self, name: str) -> None:
        bounds = [bound for bound, _ in self.buckets]
        counts = [count for _, count in self.buckets]
        assert len(bounds) > 2 and bounds == sorted(set(bounds)), f"{name}: bounds {bounds}"
        assert bounds[-1] == math.inf, f"{name}: no +Inf"
        assert counts == sorted(counts) and counts[0] >= 0, f"{name}: counts {counts}"
        assert counts[-1] == self.count, f"{name}: +Inf has {counts[-1]}, count {self.count}"
        least, most = self._bounds()
        assert least <= self.sum <= most, f"{name}: sum {self.sum}"

    def _bounds(self) -> tuple[float, float]:
        """Between what the values can add up to, by their buckets."""
        least = most = below = bound_below = 0.0
        for bound, count in self.buckets:
            if count > below:
                least += (count - below) * bound_below
                most += (count - below) * bound
            below, bound_below = count, bound
        return least, most


class Scrape:
    """`histograms` by name; `count` and `sum` add up what has all the labels that are given."""

    def __init__(self, text: str) -> None:
        self.histograms: dict[str, dict[Labels, Series]] = {}
        families = list(text_string_to_metric_families(text))
        names = [family.name for family in families]
        assert len(names) == len(set(names)), "a name has two families"
        for family in families:
            assert family.type != "untyped" and family.documentation, family.name
            points = [(s.name, frozenset(s.labels.items())) for s in family.samples]
            assert len(points) == len(set(points)), f"{family.name}: a sample is there twice"
            if family.type == "histogram":
                self.histograms[family.name] = _series(family)

    def count(self, name: str, **labels: str) -> float:
        return sum(series.count for series in self._of(name, labels))

    def sum(self, name: str, **labels: str) -> float:
        return sum(series.sum for series in self._of(name, labels))

    def _of(self, name: str, labels: dict[str, str]) -> list[Series]:
        found = self.histograms.get(name, {})
        return [series for key, series in found.items() if labels.items() <= dict(key).items()]


def _series(family: Any) -> dict[Labels, Series]:
    found: dict[Labels, Series] = defaultdict(Series)
    for sample in family.samples:
        labels = dict(sample.labels)
        bound = labels.pop("le", None)
        series = found[frozenset(labels.items())]
        part = sample.name.removeprefix(f"{family.name}_")
        assert (part == "bucket") == (bound is not None), sample
        if bound is not None:
            series.buckets.append((float(bound), sample.value))
        else:
            setattr(series, part, sample.value)
    for labels, series in found.items():
        series.check(f"{family.name}{sorted(labels)}")
    return dict(found)
