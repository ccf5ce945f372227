"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_diffusion.bench.run import Row, inaccurate

COLUMNS = ("op", "shape", "dtype", "by", "ms", "peer", "ratio", "bar", "", "rate", "of limit")


def lines(record: dict[str, Any], reason: Callable[[Row], str] = lambda row: "") -> list[str]:
    """The machine, the table, and how many bars are met. `reason` explains a missed bar."""
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    limits = ", ".join(f"{name} {rate:.0f}" for name, rate in record["limits"].items())
    cells = [list(COLUMNS), *(_cells(row) for row in record["rows"])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    ends = ["", *(reason(row) if row["met"] is False else "" for row in record["rows"])]
    out = [facts, *([f"limits: {limits}"] if limits else []), ""]
    for line, end in zip(cells, ends, strict=True):
        text = "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        out.append(f"{text}  {end}".rstrip())
    barred = [row for row in record["rows"] if row["met"] is not None]
    if barred:
        out += ["", f"{sum(row['met'] for row in barred)} of {len(barred)} bars are met."]
    for row in filter(inaccurate, record["rows"]):
        out.append(f"error: {row['op']} {row['shape']} {row['error']:.2g}, {row['peer_error']:.2g}")
    return out


def _cells(row: Row) -> list[str]:
    by_compiler = row["ratio"] is None
    return [
        row["op"],
        row["shape"],
        row["dtype"],
        row["implementation"],
        f"{row['ms']:.3g}",
        row["peer"],
        "no compiler" if by_compiler else f"{row['ratio']:.2f}x",
        "" if row["bar"] is None else f"{row['bar']:g}x",
        {None: "", True: "met", False: "missed"}[row["met"]],
        f"{row['rate']:.4g} {row['unit']}",
        f"{row['share']:.0%}",
    ]
