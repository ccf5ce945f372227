"""What the benchmarks of this folder share: where results go, and who ran them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from sgl_diffusion.bench.machine import facts

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Who ran this, for the result file."""
    return facts(device) | {"commit": commit()}


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip() or "none"
