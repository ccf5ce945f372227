"""Launch settings: how a row is cut into blocks and how many warps work on it."""

from __future__ import annotations

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


def num_warps(block: int) -> int:
    """Warps for a block: 8 elements, 16 bytes of a 16-bit type, a thread."""
    return min(8, max(1, block // 256))
