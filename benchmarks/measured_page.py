"""The parts of docs/measured.md that are written from result files, each between two marks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measured.md"

Block = Callable[[dict[str, Any], str], str]


def write(name: str, block: Block, record: dict[str, Any], path: Path) -> None:
    """Replace the part of that name by `block` of the record in the result file `path`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = PAGE.read_text().partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{PAGE} has lost its marks"
    source = path.absolute().relative_to(ROOT).as_posix()
    PAGE.write_text(before + begin + block(record, source) + end + after)


def main(name: str, block: Block) -> None:
    """The command of a page's own file: the name of the result file is its only argument."""
    path = Path(sys.argv[1])
    write(name, block, json.loads(path.read_text()), path)
