"""docs/kernels.md says of every GPU implementation whether it was validated, and nothing else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from sgl_diffusion import ops
from sgl_diffusion.ops.validated import VALIDATED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text()
NOT_YET = "not yet run on a GPU"


def _table(title: str) -> list[tuple[str, ...]]:
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) > 1, title
    return [row for row in rows if row[2] != "validated on a GPU"]


def _state(op: str, name: str) -> str:
    archs = sorted(arch for known, by, arch in VALIDATED if (known, by) == (op, name))
    return ", ".join(archs) or NOT_YET


def test_every_row_of_the_dispatch_is_in_the_table() -> None:
    want = [
        (op, fast.name, _state(op, fast.name))
        for op in sorted(ops.OPS)
        for fast in ops.OPS.get(op).fast
        if "cuda" in fast.devices
    ]
    assert _table("Ops with rows in the dispatch") == want


def test_host_functions_exist() -> None:
    for kernel, function, state in _table("Kernels with a host function and no row"):
        module, _, name = function.strip("`").rpartition(".")
        assert callable(getattr(importlib.import_module(f"sgl_diffusion.{module}"), name)), kernel
        assert state == NOT_YET


def test_results_of_validated_kernels_are_there() -> None:
    for file in VALIDATED.values():
        assert (ROOT / "benchmarks" / "results" / Path(file).name).is_file(), file
