"""How much a runner does at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Most rows of a batch, most jobs worked on at a time (0: all), most bytes of prompts kept;
    whether to encode and decode beside the steps, and whether sizes may share one. Steps become
    CUDA graphs never, where it pays ("auto") or always ("on"), with so many bytes of them. So many
    batches take their steps at the same time, at most, if other things may go on beside them."""

    rows: int = 8
    jobs: int = 0
    prompt_bytes: int = 0
    overlap: bool = True
    packing: bool = True
    lanes: int = 1
    graphs: Literal["", "auto", "on"] = ""
    graph_bytes: int = 0
