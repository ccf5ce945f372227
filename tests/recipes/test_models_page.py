"""The table in docs/models.md is the catalog. Run this file to write it anew."""

from __future__ import annotations

from pathlib import Path

from sgl_diffusion.cli.models import described
from sgl_diffusion.recipes.catalog import CATALOG

PAGE = Path(__file__).parents[2] / "docs/models.md"
BEGIN = "<!-- models: written by `python tests/recipes/test_models_page.py` -->\n"
END = "<!-- end -->"


def table() -> str:
    lines = ["| model | pipeline class | tasks | defaults |", "|---|---|---|---|"]
    lines += [
        f"| {entry.model} | `{entry.pipeline_class}` | {' '.join(entry.tasks)} "
        f"| {described(entry.defaults)} |"
        for entry in CATALOG
    ]
    return "\n".join(lines) + "\n"


def test_the_table_is_the_catalog() -> None:
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == table()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
