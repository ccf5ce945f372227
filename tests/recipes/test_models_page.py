"""The table in docs/models.md is the catalog. Run this file to write it anew."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from sgl_diffusion.cli.models import described
from sgl_diffusion.recipes.catalog import CATALOG
from sgl_diffusion.recipes.fallback_calls import reason_against
from sgl_diffusion.recipes.registry import NATIVE, SAME_PARTS

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


def test_the_page_names_every_relative_of_our_families_and_what_becomes_of_it() -> None:
    import diffusers

    families = ("Flux", "QwenImage", "StableDiffusion3", "Wan", "ZImage")
    text = PAGE.read_text()
    relatives = text.partition("## Relatives")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in relatives.splitlines() if line.startswith("| `")]
    said = {name: row[1] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    known = {
        name: inspect.signature(getattr(diffusers, name).__call__).parameters
        for name in dir(diffusers)
        if name.startswith(families) and name.endswith("Pipeline") and "Modular" not in name
    }
    assert said.keys() == known.keys() - NATIVE
    for name, fate in said.items():
        refused = reason_against(name, known[name]) is not None
        assert fate.startswith("refused") == (refused and name not in SAME_PARTS), name
        assert (f"`{SAME_PARTS[name]}`" in fate) if name in SAME_PARTS else "recipe" not in fate


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
