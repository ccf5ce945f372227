"""docs/reliability.md names tests and benchmarks that are there, in every row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.endswith("| shown by |")
]


def missing(name: str) -> str:
    """Why a name of the last column leads nowhere; "" where it does not."""
    file, _, test = name.partition("::")
    path = ROOT / file if file.startswith("benchmarks/") else ROOT / "tests" / file
    path = path if path.suffix == ".py" else path.with_name(f"{path.name}.py")
    if not path.is_file():
        return f"there is no {path.relative_to(ROOT)}"
    if test and not re.search(rf"^(async )?def {test}\(", path.read_text(), re.M):
        return f"{path.name} has no {test}"
    return ""


def test_every_row_is_shown_by_something_that_is_there() -> None:
    assert len(ROWS) > 35
    for row in ROWS:
        names = re.findall(r"`([^`]+)`", row[-1])
        assert names, f"nothing shows: {row}"
        assert all("::" in name or name.endswith(".py") for name in names), row
        assert not [why for name in names if (why := missing(name))]


@pytest.mark.parametrize("name", ["faults/nothing::test_x", "server/test_jobs::test_nothing"])
def test_a_name_that_leads_nowhere_is_found(name: str) -> None:
    assert missing(name)


def test_the_contract_is_complete_and_every_row_has_a_figure() -> None:
    contract = [row for row in ROWS if row[0].lstrip("| ").isdigit()]
    assert [int(row[0].lstrip("| ")) for row in contract] == list(range(1, 15))
    assert all(len(row) == 4 and row[2] for row in contract)
    assert "@" not in PAGE
