"""The ranks of one stage as a mesh of groups, and how a process joins it.

Neighbouring ranks form a Ulysses group, which exchanges most; then come the ring and the branches
of guidance. Rank = (branch * ring + place in the ring) * ulysses + place in the Ulysses group.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sgl_diffusion.distributed.group import Group
from sgl_diffusion.distributed.layout import Layout
from sgl_diffusion.distributed.nodes import Address, meeting_point

# Ranks wait for each other's forward pass at most so long; the first one may load or decode.
EXCHANGE_SECONDS = 120.0
CONTROL_SECONDS = 1800.0


@dataclass(frozen=True)
class Mesh:
    """`tokens` are the ranks over which a sequence is spread: its ring of Ulysses groups."""

    layout: Layout
    tokens: Group
    ulysses: Group
    ring: Group
    branches: Group

    @classmethod
    def of(cls, layout: Layout, rank: int, seconds: float = EXCHANGE_SECONDS) -> Mesh:
        """Every rank of the world calls this with the same layout."""
        wait = timedelta(seconds=seconds)
        spread, ulysses = layout.tokens, layout.ulysses
        sets = range(0, layout.ranks, spread)
        return cls(
            layout,
            _mine(rank, [range(s, s + spread) for s in sets], wait),
            _mine(rank, [range(s, s + ulysses) for s in range(0, layout.ranks, ulysses)], wait),
            _mine(
                rank,
                [range(s + u, s + spread, ulysses) for s in sets for u in range(ulysses)],
                wait,
            ),
            _mine(rank, [range(t, layout.ranks, spread) for t in range(spread)], wait),
        )


def _mine(rank: int, sets: list[range], wait: timedelta) -> Group:
    """The one of these groups that `rank` is in; torch wants every rank to make them all."""
    mine = None
    for ranks in sets:
        handle = dist.new_group(list(ranks), timeout=wait) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Group(ranks, rank, handle)
    assert mine is not None, f"rank {rank} is in none of {sets}"
    return mine


def join_world(rendezvous: Path | Address, rank: int, ranks: int, device: torch.device) -> Group:
    """Meet the other ranks through a file that does not exist yet, or at an address of the first
    one; returns the group on the CPU by which the first rank leads the others."""
    if isinstance(rendezvous, Address):
        store = meeting_point(rendezvous, first=rank == 0, seconds=CONTROL_SECONDS)
    else:
        store = dist.FileStore(str(rendezvous), ranks)
    wait = timedelta(seconds=CONTROL_SECONDS)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=wait)
    everyone = range(ranks)
    return Group(everyone, rank, dist.new_group(list(everyone), timeout=wait, backend="gloo"))


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
