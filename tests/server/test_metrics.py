"""Every metric that the code counts is described, in /metrics and in docs/jobs.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sgl_diffusion
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server.metric_help import HELP
from sgl_diffusion.server.metrics import render

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/jobs.md"
TABLE = re.compile(r"(?<=<!-- metrics: begin -->\n).*?(?=<!-- metrics: end -->)", re.S)


def page(text: str) -> str:
    """`text` with the table made anew."""
    rows = ["| sample | labels | |", "|---|---|---|"]
    for name, (labels, said) in HELP.items():
        shown = ", ".join(f"`{label}`" for label in labels.split(", ") if label)
        rows.append(f"| `{name}` | {shown} | {said} |")
    return TABLE.sub("\n".join(rows) + "\n", text)


def counted() -> set[str]:
    """The names of all samples in the code."""
    folder = Path(sgl_diffusion.__file__).parent
    names = {name for path in folder.rglob("*.py") for name in _named(ast.parse(path.read_text()))}
    return {re.sub("_(sum|count)$", "", name) for name in names}


def _named(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("Metric", "Histogram") or re.fullmatch(r".*counters\.(add|set)", called):
                first = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "name")]
                yield from (n.value for n in first if isinstance(n, ast.Constant))
        elif isinstance(node, ast.FunctionDef) and node.name in ("metrics", "gauges"):
            yield from _keys(node)


def _keys(function: ast.FunctionDef) -> Iterator[str]:
    """Of samples that come out of a dictionary."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "labels":
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            yield from (key.value for key in node.value.keys if isinstance(key, ast.Constant))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            index = node.targets[0].slice
            yield from [index.value] if isinstance(index, ast.Constant) else []


def test_every_sample_is_described_and_nothing_else():
    assert counted() == HELP.keys()


def test_the_page_has_them_all():
    assert PAGE.read_text() == page(PAGE.read_text()), "run: python tests/server/test_metrics.py"


def test_a_scrape_says_what_they_are():
    samples = [
        Metric("step_seconds_sum", 1.5, {"model": "m", "size": "64x64"}),
        Metric("step_seconds_count", 3, {"model": "m", "size": "64x64"}),
        Metric("jobs_refused_total", 2),
        Metric("queue_depth", 1, {"kind": "image"}, "gauge"),
    ]
    lines = render(samples).decode().splitlines()
    assert (
        "# HELP sgld_step_seconds Denoise steps, whatever their rows; `mixed`: several sizes"
        in lines
    )
    assert "# HELP sgld_jobs_refused_total Jobs for which there was no place" in lines
    assert "# HELP sgld_queue_depth Images and videos that wait" in lines
    assert "# TYPE sgld_queue_depth gauge" in lines


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
