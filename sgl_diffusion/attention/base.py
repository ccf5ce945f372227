"""What an attention backend is, and what a model is given to call.

Shapes: q [B, S, H, d], k and v [B, L, H, d], any strides; the result is [B, S, H, d]. No mask and
no dropout: every token attends to every token, as in all diffusion transformers served here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sgl_diffusion.attention.packed import RowLengths


class Attend(Protocol):
    """`softmax(q kᵀ * scale) v` per head, with scale 1/√d unless given."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Tensor: ...


class AttendPacked(Protocol):
    """The same for rows of different lengths in one sequence: q [N, H, d], k and v [M, H, d]."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: RowLengths, *, scale: float | None = None
    ) -> Tensor: ...


class AttendRepeated(Protocol):
    """The same where a key stands for several equal ones: `repeats` [B, L], the logarithms of how
    many in fp32, are added to the scores."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, repeats: Tensor, *, scale: float | None = None
    ) -> Tensor: ...


class AttentionBackend(Protocol):
    """One implementation of attention on one device."""

    name: str

    def supports(
        self, device: torch.device, head_dim: int, dtype: torch.dtype, needs_lse: bool
    ) -> str | None:
        """None if this backend can run, else the reason why not.

        `needs_lse`: the logarithms of the softmax sums are wanted as well.
        """
        ...

    def unproven(self, device: torch.device) -> str | None:
        """Why "auto" never takes it on a device: nobody has checked it there."""
        ...

    def slower(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why "auto" passes it over here although it could run: measured slower than sdpa."""
        ...

    def least_queries(self, device: torch.device, dtype: torch.dtype) -> int:
        """With fewer queries in a call sdpa was measured to be faster: "auto" takes it for them."""
        ...

    def repeated(self, device: torch.device) -> AttendRepeated | None:
        """Attention to keys that stand for several, where this backend has it on a device."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor: ...

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: RowLengths, *, scale: float | None = None
    ) -> Tensor: ...


class LseBackend(AttentionBackend, Protocol):
    """A backend that supports `needs_lse`: its results over parts of the keys can be merged."""

    def forward_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The result and its log-sum-exp, fp32 [B, H, S]."""
        ...


@dataclass(frozen=True)
class AttentionContext:
    """The attention a model calls, put in from outside.

    `tokens` attends over the latent tokens, which a sequence strategy may have spread over ranks;
    `local` over keys that every rank has, such as those of the text; `packed` within rows of
    different lengths, where one rank has everything; `repeated` over keys like those of `local`
    which stand for several each.
    """

    tokens: Attend
    local: Attend
    packed: AttendPacked | None = None
    repeated: AttendRepeated | None = None

    @classmethod
    def on_one_rank(
        cls, backend: AttentionBackend, repeated: AttendRepeated | None = None
    ) -> AttentionContext:
        return cls(backend.forward, backend.forward, backend.forward_packed, repeated)
