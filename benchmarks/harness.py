"""What the benchmarks of this folder share: where results go, and who ran them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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


def finish(record: dict[str, Any], save: bool, where: str = "cpu") -> Path:
    """Print a record as the last line; with `save` it is also kept, under the name returned."""
    path = RESULTS / f"{where}-{record['machine']['date']}-{record['benchmark']}.json"
    if save:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"saved {path.name}", file=sys.stderr)
    print(json.dumps(record))
    return path


class Busy:
    """How many cores other processes keep busy from now on."""

    def __init__(self) -> None:
        self._begin = self._now()

    def cores(self) -> float:
        wall, every, own = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        return round(max(0.0, (every - own) / wall), 2)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [
            int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        ]
        used = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), used, time.process_time()
