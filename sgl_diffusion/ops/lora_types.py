"""What the LoRA ops take and give: adapters on a weight, and records of merged weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
