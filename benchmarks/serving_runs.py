"""What is made of whole runs of bench_serving.py: ratios of one, medians of several."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]
# How each ratio of ours to a peer is made: figure, load, peer, number of clients.
RATIOS: dict[str, tuple[str, str, str, int]] = {
    "throughput_vs_plain": ("pictures_per_s", "closed", "plain", 8),
    "cpu_throughput_vs_plain": ("pictures_per_cpu_s", "closed", "plain", 8),
    "throughput_vs_one": ("pictures_per_s", "closed", "one", 8),
    "cpu_throughput_vs_one": ("pictures_per_cpu_s", "closed", "one", 8),
    "short_p95_vs_one": ("total_p95", "mixed", "one", 4),
    "short_p95_vs_plain": ("total_p95", "mixed", "plain", 4),
    "video_p50_vs_one": ("video_p50", "mixed", "one", 4),
    "video_p50_vs_plain": ("video_p50", "mixed", "plain", 4),
}


def bars(rows: list[Row]) -> dict[str, float]:
    """The ratios of one run."""

    def value(key: str, load: str, server: str, clients: int) -> float:
        wanted = {"server": server, "load": load, "clients": clients}
        (found,) = (float(row[key]) for row in rows if wanted.items() <= row.items())
        return found

    return {
        name: value(key, load, "ours", clients) / value(key, load, peer, clients)
        for name, (key, load, peer, clients) in RATIOS.items()
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each ratio over all runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def record(machine: Row, runs: list[Row]) -> Row:
    """What is saved: `runs` are peer, rows, bars and circumstances of each; rows say of which run
    they are, and the bars beside them are the medians."""
    rows = [{"run": number, **row} for number, run in enumerate(runs, 1) for row in run["rows"]]
    each = [{key: value for key, value in run.items() if key != "rows"} for run in runs]
    return {
        "benchmark": "serving",
        "machine": machine,
        "peer": " and ".join(sorted({run["peer"] for run in runs})),
        "rows": rows,
        "bars": medians([run["bars"] for run in runs]),
        "runs": each,
    }
