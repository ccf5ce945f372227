"""The LoRA table of docs/measured.md from a result file.

python benchmarks/lora_page.py RESULT.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measured_page

# By rank: at least so many times as fast as PEFT, at most so many copies of the weights.
BARS = {16: (5.0, 1.5), 64: (3.0, 2.5), 128: (3.0, 2.5)}
STEP = 1.25  # a step with adapters over one without, at most

Row = dict[str, Any]


def block(record: dict[str, Any], source: str) -> str:
    facts = record["machine"]
    lines = [
        f"{facts['cpu']} ({facts['isa']}), threads: {facts['threads']}, torch {facts['torch']}, "
        f"{facts['date']}, `{source}`.",
        f"Medians of {facts['repeats']}; it took {facts['seconds']} s; other processes used "
        f"{facts['other_cores']} cores meanwhile. Bars in brackets.",
        "",
        "| layers | rank | copy ms | set ms | of PEFT's speed | set / copy | unmerge / copy "
        "| bits a weight | step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in record["rows"]]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    least, most = BARS[row["rank"]]
    step = f"{row['step_ratio']:.2f} ({STEP})" if row["step_ratio"] else ""
    cells = [
        f"{row['model']}, blocks: {row['blocks']}",
        str(row["rank"]),
        f"{row['copy_ms']:.1f}",
        f"{row['set_ms']:.1f}",
        f"{row['vs_peft']:.1f} ({least:g})",
        f"{row['set_per_copy']:.2f} ({most:g})",
        f"{row['unmerge_per_copy']:.2f}",
        f"{row['bits/weight']:.2f}",
        step,
    ]
    return f"| {' | '.join(cells)} |"


def write(record: dict[str, Any], path: Path) -> None:
    measured_page.write("lora", block, record, path)


if __name__ == "__main__":
    measured_page.main("lora", block)
