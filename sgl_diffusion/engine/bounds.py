"""How much a runner does at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Most rows of a batch, most jobs worked on at a time (0: all), most bytes of prompts kept;
    whether to encode and decode beside the steps, and whether sizes may share one."""

    rows: int = 8
    jobs: int = 0
    prompt_bytes: int = 0
    overlap: bool = True
    packing: bool = True
