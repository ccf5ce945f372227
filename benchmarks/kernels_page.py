"""The table of docs/measured.md from a result file, and the reasons of missed bars that it gives.

python benchmarks/kernels_page.py RESULT.json
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measured_page
from benchmarks.measured_page import PAGE

UNKNOWN = "no reason is known yet: add it to docs/measured.md"

Row = dict[str, Any]


def variant(row: Row) -> str:
    """The head dim of an attention and the rank of a merge, which have bars of their own."""
    sizes = row["shape"].split("x")
    if row["op"] == "attention":
        return f"{'' if sizes[0] == sizes[1] else ' cross'} d{sizes[-1]}"
    return f" r{sizes[-1]}" if row["op"] == "lora_merge_" else ""


def label(row: Row) -> str:
    return f"{row['op']}{variant(row)} {row['dtype']} over {row['peer']}"


def reasons(page: str | None = None) -> dict[str, str]:
    """Reasons by label: the lines "| `attention d64 bf16 over sdpa` | reason |" of the page."""
    text = PAGE.read_text() if page is None else page
    return dict(re.findall(r"^\| `([^`]+ over [^`]+)` \| (.+) \|$", text, re.MULTILINE))


def reason(row: Row, known: dict[str, str]) -> str:
    return known.get(label(row), UNKNOWN)


def block(record: dict[str, Any], source: str) -> str:
    """The part of the page between its two marks: a line for each group of rows with one bar."""
    facts = record["machine"]
    limits = ", ".join(f"{name} {rate:.0f}" for name, rate in record["limits"].items())
    lines = [
        f"{facts['cpu']} ({facts['isa']}), threads: {facts['threads']}, torch {facts['torch']}, "
        f"{facts['date']}, `{source}`.",
        f"Other processes used {facts['other_cores']} cores; limits: {limits}.",
        "",
        "| op | peer | ratio by shape | bar | aim | | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in groups(record["rows"]):
        op, _, peer = name.partition(" over ")
        ratios = ", ".join("-" if row["ratio"] is None else f"{row['ratio']:.2f}" for row in rows)
        shares = " to ".join(
            dict.fromkeys(f"{edge(r['share'] for r in rows):.0%}" for edge in EDGE)
        )
        bar, aim = rows[0]["bar"], rows[0]["aim"]
        bars = f"{bar:g} | {aim:g}" if bar else " | "
        lines.append(f"| {op} | {peer} | {ratios} | {bars} | {_met(rows)} | {shares} |")
    return "\n".join(lines) + "\n"


EDGE = (min, max)


def groups(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    key = {id(row): (label(row), row["bar"] is None) for row in rows}
    order = list(dict.fromkeys(key.values()))
    for place, group in groupby(
        sorted(rows, key=lambda row: order.index(key[id(row)])), key=lambda row: key[id(row)]
    ):
        yield place[0], list(group)


def _met(rows: list[Row]) -> str:
    barred = [row["met"] for row in rows if row["met"] is not None]
    if not barred:
        return ""
    if all(barred):
        return "met"
    return f"missed {barred.count(False)} of {len(barred)}" if any(barred) else "missed"


def write(record: dict[str, Any], path: Path) -> None:
    measured_page.write("kernels", block, record, path)


if __name__ == "__main__":
    measured_page.main("kernels", block)
