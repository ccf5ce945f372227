"""docs/kernels.svg from a result file: how many times faster each op is than its peers.

    python benchmarks/kernels_picture.py RESULT.json

One bar for an op and a peer, from the slowest to the fastest shape in a lighter tone; the tick is
the ratio that was asked for. The scale is logarithmic: doubling is the same distance everywhere.
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.kernels_page import groups
from benchmarks.measured_page import ROOT

PICTURE = ROOT / "docs" / "kernels.svg"
LEFT, RIGHT, TOP, LINE, WIDTH = 330, 70, 64, 22, 900
LEAST, MOST = 0.25, 64.0

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e }
  .title { font-size: 15px; font-weight: 600 }
  .grid { stroke: #d1d9e0 } .one { stroke: #59636e }
  .bar { fill: #1a7f37 } .missed { fill: #9a6700 } .free { fill: #0969da }
  .range { opacity: .35 } .tick { stroke: #1f2328; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 }
    .grid { stroke: #3d444d } .one { stroke: #9198a1 }
    .bar { fill: #3fb950 } .missed { fill: #d29922 } .free { fill: #4493f8 }
    .tick { stroke: #f0f6fc }
  }
"""


def at(ratio: float) -> float:
    """Where a ratio lies."""
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def picture(record: dict[str, Any]) -> str:
    bars = [
        (name, rows, [row["ratio"] for row in rows if row["ratio"] is not None])
        for name, rows in groups(record["rows"])
    ]
    bars = [bar for bar in bars if bar[2]]
    height = TOP + LINE * len(bars) + 34
    facts = record["machine"]
    subtitle = (
        f"{facts['cpu']} ({facts['isa']}), threads: {facts['threads']}, torch {facts['torch']}, "
        f"{facts['date']}; other processes used {facts['other_cores']} cores"
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>CPU kernels: times faster than their peers</title><style>{STYLE}</style>",
        '<text class="title" x="16" y="24">CPU kernels: times faster than their peers</text>',
        f'<text class="small" x="16" y="42">{escape(subtitle)}</text>',
    ]
    ratio = LEAST
    while ratio <= MOST:
        x, kind = at(ratio), "one" if ratio == 1 else "grid"
        out.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" '
                   f'y2="{height - 28}"/>')  # fmt: skip
        out.append(f'<text class="small" x="{x:.1f}" y="{height - 12}" '
                   f'text-anchor="middle">{ratio:g}x</text>')  # fmt: skip
        ratio *= 2
    for number, (name, rows, ratios) in enumerate(bars):
        out += _bar(name, rows, ratios, TOP + LINE * number)
    return "\n".join([*out, "</svg>"]) + "\n"


def _bar(name: str, rows: list[dict[str, Any]], ratios: list[float], y: int) -> list[str]:
    bar, middle = rows[0]["bar"], median(ratios)
    kind = "free" if bar is None else "bar" if min(ratios) >= bar else "missed"
    start, low, high = at(1), at(min(ratios)), at(max(ratios))

    def box(a: float, b: float, more: str = "") -> str:
        x, width = min(a, b), max(abs(a - b), 1.0)
        return (
            f'<rect class="{kind}{more}" x="{x:.1f}" y="{y + 3}" '
            f'width="{width:.1f}" height="{LINE - 8}" rx="2"/>'
        )

    out = [
        f'<text x="{LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
        box(start, at(middle)),
        box(low, high, " range"),
        f'<text class="small" x="{max(start, high, at(bar or 0.0)) + 6:.1f}" y="{y + 14}">'
        f"{middle:.2g}x</text>",
    ]
    if bar is not None:
        x = at(bar)
        out.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + LINE - 2}"/>')
    return out


def write(record: dict[str, Any]) -> None:
    PICTURE.write_text(picture(record))


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()))
