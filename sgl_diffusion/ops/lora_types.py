"""What the LoRA ops take and give: adapters on a weight, and records of merged weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

# The order of sums that csrc/include/sgld/lora.h describes. A record can only be undone with the
# same bits, so an implementation with another order needs another name.
ALGORITHM = "chains-32"


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """One adapter on one weight [out, in]: `scale * up @ down` on rows from `start`.

    down [rank, in]; up [rows, rank], where rows may be a segment of a fused weight (q, k or v of a
    fused qkv). Every dtype of its own; they must stay as they are while they are merged.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + self.up.shape[0]


@dataclass(frozen=True, eq=False)
class LoraPart:
    """The factors of n adapters on the same rows of a weight: down [n, rank, in] and up
    [n, rows, rank], with the scales multiplied in. Where a rank is lower, the rest is zeros."""

    down: Tensor
    up: Tensor
    start: int = 0

    def __post_init__(self) -> None:
        assert self.down.shape[:2] == (self.up.shape[0], self.up.shape[2]), "factors of other ranks"


class LoraStack(Sequence[tuple[LoraDelta, ...]]):
    """Adapters side by side in tensors that stay where they are, for `lora_apply`.

    What is written into the tensors is what the next call applies; a call makes nothing on the host
    that depends on them. So a CUDA graph can hold on to them.
    """

    def __init__(self, parts: Sequence[LoraPart]) -> None:
        assert len({part.down.shape[0] for part in parts}) == 1, (
            "parts of other numbers of adapters"
        )
        self.parts = tuple(parts)
        self._adapters = [
            tuple(LoraDelta(part.down[n], part.up[n], 1.0, part.start) for part in parts)
            for n in range(parts[0].down.shape[0])
        ]

    def __len__(self) -> int:
        return len(self._adapters)

    @overload
    def __getitem__(self, index: int) -> tuple[LoraDelta, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[LoraDelta, ...]]: ...

    def __getitem__(
        self, index: int | slice
    ) -> tuple[LoraDelta, ...] | list[tuple[LoraDelta, ...]]:
        return self._adapters[index]


@dataclass(frozen=True, eq=False)
class LoraRecord:
    """What restores one merged weight, exactly. It can be moved, stored and read back.

    codes int32 [rows, words] holds 2 to 4 bits per weight, escapes the weights (in their dtype)
    that a code cannot describe, ends int64 [blocks + 1] where each block's escapes end. Without
    codes the escapes are a copy of all weights. It covers the rows from `start` that adapters
    reach.
    """

    codes: Tensor
    escapes: Tensor
    ends: Tensor
    checksum: int
    start: int
    shape: tuple[int, int]  # of the rows it covers
    deltas: tuple[LoraDelta, ...]
    algorithm: str = ALGORITHM

    @property
    def is_copy(self) -> bool:
        """Whether the weights did not suit codes, and are kept whole."""
        return self.codes.shape[1] == 0 and self.escapes.numel() > 0

    @property
    def nbytes(self) -> int:
        """Bytes that it adds; the adapters' own are not among them."""
        return self.codes.nbytes + self.escapes.nbytes + self.ends.nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> LoraRecord:
        """The record with its tensors on a device; the adapters stay where they are."""
        return replace(
            self,
            codes=self.codes.to(device),
            escapes=self.escapes.to(device),
            ends=self.ends.to(device),
        )
