"""docs/environment.md is the table of base/env.py. Run this file to write it anew."""

from __future__ import annotations

import re
from pathlib import Path

from sgl_diffusion.base.env import TABLE

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/environment.md"


def page() -> str:
    lines = [
        "# Environment variables",
        "",
        "Generated from `sgl_diffusion/base/env.py` by `python tests/cli/test_docs.py`.",
        "A value that cannot be read is an error; flags say more than variables and win over them.",
        "",
        "| name | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for variable in sorted(TABLE.values(), key=lambda variable: variable.name):
        kind = {"_flag": "0 or 1"}.get(variable.parse.__name__, variable.parse.__name__)
        default = "" if variable.default == "" else f"`{variable.default}`"
        lines.append(f"| `{variable.name}` | {kind} | {default} | {variable.doc} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_the_table():
    assert PAGE.read_text() == page(), "run: python tests/cli/test_docs.py"


def test_only_the_table_reads_the_environment():
    for path in (ROOT / "sgl_diffusion").rglob("*.py"):
        if path.name != "env.py":
            found = re.search(r"os\.(environ|getenv)", path.read_text())
            assert found is None, path


if __name__ == "__main__":
    PAGE.write_text(page())
