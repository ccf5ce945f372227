"""Which arrangement of the ranks is fastest for a model, by a table of costs. Imports no torch.

A step is reckoned as the arithmetic of one rank plus what it exchanges. The figures of the table
are rough: they only have to order the arrangements.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion.distributed.layout import BRANCHES, Layout


@dataclass(frozen=True)
class Work:
    """One denoise step of a model at its default size: so many tokens through so many blocks."""

    tokens: int
    heads: int
    head_dim: int
    blocks: int
    guided: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Costs:
    """Of one rank: FLOP/s, bytes/s to other ranks, seconds an exchange takes at least, and bytes of
    a value; `exchanges` says over what."""

    flops: float
    bandwidth: float
    latency: float
    value: int
    exchanges: str


# What each further part of attention takes beside its arithmetic: shorter kernels, and the merge.
PART = 0.08

COSTS = {  # by the type of the device
    "cpu": Costs(5e10, 1e9, 3e-4, 4, "gloo over loopback"),
    "cuda": Costs(5e14, 3e11, 3e-5, 2, "NCCL over NVLink"),
}


@dataclass(frozen=True)
class Plan:
    layout: Layout
    seconds: float
    second: tuple[Layout, float] | None  # the next best

    def __str__(self) -> str:
        text = f"{self.layout}, {self.seconds:.2g} s a step by the table of costs"
        if self.second is not None:
            layout, seconds = self.second
            text += f"; next best: {layout}, {seconds:.2g} s"
        return text


def plan(layouts: list[Layout], work: Work, costs: Costs) -> Plan:
    """The fastest of these arrangements; of equal ones that with the shortest ring."""
    ranked = sorted(
        (step_seconds(layout, work, costs), layout.ring, layout.cfg, layout) for layout in layouts
    )
    seconds, _, _, layout = ranked[0]
    second = (ranked[1][-1], ranked[1][0]) if len(ranked) > 1 else None
    return Plan(layout, seconds, second)


def step_seconds(layout: Layout, work: Work, costs: Costs) -> float:
    branches = BRANCHES if work.guided else 1
    passes = -(-branches // layout.cfg)
    seconds = passes * _pass_seconds(layout, work, costs)
    if layout.cfg > 1:  # the branches swap their velocities
        seconds += costs.latency + work.tokens * 64 * costs.value / costs.bandwidth
    return seconds


def _pass_seconds(layout: Layout, work: Work, costs: Costs) -> float:
    """One forward pass: linear layers, attention, and what either has to fetch."""
    tokens, width = work.tokens / layout.tokens, work.width
    linear = 24 * tokens * width**2 / costs.flops
    # The rank with the most heads keeps the others of its group waiting.
    most_heads = -(-work.heads // layout.ulysses)
    queries = work.tokens / layout.ring
    attention = 4 * queries * work.tokens * most_heads * work.head_dim / costs.flops
    if layout.ulysses > 1:
        moved = 4 * tokens * width * (layout.ulysses - 1) / layout.ulysses
        linear += 2 * costs.latency + moved * costs.value / costs.bandwidth
    if layout.ring > 1:  # keys and values travel while the part before them is computed
        turns = layout.ring - 1
        keys = 2 * queries * most_heads * work.head_dim * costs.value / costs.bandwidth
        waits = costs.latency + max(0.0, keys - attention / layout.ring)
        attention += turns * (attention * PART + waits)
    joined = 0.0
    if layout.tokens > 1:
        share = work.tokens * (layout.tokens - 1) / layout.tokens
        joined = costs.latency + share * width * costs.value / costs.bandwidth
    return work.blocks * (linear + attention) + joined
