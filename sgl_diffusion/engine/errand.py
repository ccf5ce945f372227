"""What is done for one job alone: the encoding of its prompts, the decoding of its rows.

Any thread may do the work of an errand, as it changes nothing that a step looks at. What it leads
to is for the thread that runs the steps: it takes the result, or makes as if nothing had been done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sgl_diffusion.engine.job import Job

Lane = Literal["encode", "decode"]
GoOn = Callable[[], bool]  # whether to do more than one chunk


@dataclass(frozen=True, eq=False)
class Errand:
    lane: Lane
    job: Job
    work: Callable[[GoOn], Any]
    take: Callable[[Any], None]
    undo: Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """Of an errand that was done in another thread, in so many seconds."""

    errand: Errand
    result: Any
    error: Exception | None
    seconds: float
