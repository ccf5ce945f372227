"""Launch settings: how a row is cut into blocks and how many warps work on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_BLOCKS = (4096, 2048, 1024, 512, 256)
_ONE_BLOCK = 1024


def row_blocks(width: int) -> tuple[int, int]:
    """(block, number of blocks) that cover a row.

    Triton's blocks are powers of two: one block for a width of 5120 would leave 37% of the lanes
    idle, so a wide row is cut into the largest equal blocks that pad least.
    """
    if width <= _ONE_BLOCK:
        return max(16, 1 << (width - 1).bit_length()), 1
    block = min(_BLOCKS, key=lambda size: (-(-width // size) * size, -size))
    return block, -(-width // block)


def held_blocks(width: int) -> tuple[int, int]:
    """As row_blocks, for a kernel that keeps the whole row in registers: few blocks, wide ones."""
    if width <= _ONE_BLOCK:
        return row_blocks(width)
    sizes = [size for size in _BLOCKS if -(-width // size) <= 6] or [_BLOCKS[0]]
    block = min(sizes, key=lambda size: (-(-width // size) * size, -size))
    return block, -(-width // block)


def num_warps(block: int) -> int:
    """Warps for a block: 8 elements, 16 bytes of a 16-bit type, a thread."""
    return min(8, max(1, block // 256))


FLAT_BLOCK = 1024  # elements of a flat tensor a program takes: 8 a thread of 4 warps


def rope_blocks(heads: int, dim: int, whole: bool) -> tuple[int, int, int]:
    """(pairs of a head, heads, warps) of a program of qk_norm_rope.

    A norm over the whole token needs all of its heads in one program; without one, a program takes
    as many heads as keep 8 warps busy with 16 elements a thread.
    """
    half = _power_of_two(-(-dim // 2))
    rows = _power_of_two(heads)
    if not whole:
        rows = min(rows, max(1, 2048 // half))
    return half, rows, min(8, max(1, rows * half // 256))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@dataclass(frozen=True)
class AttentionBlocks:
    """A configuration of attention: m queries and n keys a step, and how they are loaded."""

    m: int
    n: int
    warps: int
    stages: int
    tma: bool = False


# (first architecture, head dim) -> the choice; the largest architecture that is not newer counts.
# Chosen by registers, shared memory and SASS; no row has been timed on a GPU yet.
_ATTENTION: dict[tuple[int, int], AttentionBlocks] = {
    (80, 64): AttentionBlocks(128, 64, 4, 3),
    (80, 128): AttentionBlocks(128, 64, 8, 3),
    (90, 64): AttentionBlocks(128, 128, 8, 3, tma=True),
    (90, 128): AttentionBlocks(128, 128, 8, 2, tma=True),
    (100, 64): AttentionBlocks(128, 64, 4, 3, tma=True),
    (100, 128): AttentionBlocks(128, 64, 4, 3, tma=True),
}


def attention_blocks(sm: int, dim: int) -> AttentionBlocks:
    """The tuned configuration for an architecture (90 for sm_90) and a head dim."""
    known = 64 if dim <= 64 else 128
    newest = max(first for first, _ in _ATTENTION if first <= max(sm, 80))
    return _ATTENTION[newest, known]


def attention_space(sm: int, dim: int) -> Iterator[AttentionBlocks]:
    """Every configuration worth timing on an architecture: what fits its shared memory."""
    limit = {80: 163, 90: 227, 100: 227}[max(first for first in (80, 90, 100) if first <= sm)]
    for m in (64, 128):
        for n in (64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    kib = (m + 2 * stages * n) * dim * 2 / 1024
                    if kib > limit or m * dim // (32 * warps) > 128:
                        continue  # the accumulator alone would take over half of the registers
                    yield AttentionBlocks(m, n, warps, stages)
                    if sm >= 90:
                        yield AttentionBlocks(m, n, warps, stages, tma=True)


@dataclass(frozen=True)
class LoraBlocks:
    """A tile of a weight matrix, and how much of the rank a step takes.

    `rank` is part of what a merge means: unmerge must add up in the same order. So it is one number
    for all matrices, whatever their rank.
    """

    m: int = 64
    n: int = 64
    rank: int = 32
    warps: int = 8
    stages: int = 2


LORA = LoraBlocks()
LORA_PROGRAMS_PER_SM = 2


def escape_room(count: int) -> int:
    """Weights of a matrix whose code may be the escape: with 4 bits a code and 8 bytes an escape,
    a merge keeps at most 5 bits a weight."""
    return count // 64 + 64


@dataclass(frozen=True)
class LoraApplyBlocks:
    """Tiles of lora_apply: tokens and a step of the width, then tokens and outputs; and the ranks
    of a launch, which must fit into shared memory at once."""

    shrink_m: int = 32
    shrink_k: int = 64
    expand_m: int = 64
    expand_n: int = 64
    most_rank: int = 128
    warps: int = 4
    stages: int = 3


LORA_APPLY = LoraApplyBlocks()
