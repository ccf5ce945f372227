"""Keys and values of the running rows of one decoder.

One slab per layer, [rows, heads, capacity, width]. Running rows lie at the front of it, each from
position 0 on, so that a step of all of them reads views and copies nothing. The slab stands in for
transformers' cache: its attention calls `update` and nothing else. `Tokenwise` calls `put`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GRAIN = 256


@dataclass(frozen=True)
class KvShape:
    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, decoder: torch.nn.Module) -> KvShape:
        """The shape that a decoder of transformers has by its configuration."""
        config: Any = decoder.config
        width = getattr(config, "head_dim", None)
        weight = next(decoder.parameters())
        return cls(
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            width=width or config.hidden_size // config.num_attention_heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize


@dataclass(eq=False)
class Slot:
    """The place of one row: its index, which changes when others leave, and its length."""

    index: int
    length: int = 0


class KvSlab:
    """`take` and `leave` rows; `prefill` or `decode` before each forward pass, which gets this
    object as `past_key_values`."""

    def __init__(self, shape: KvShape, rows: int) -> None:
        self.shape = shape
        self.slots: list[Slot] = []
        self.most = rows
        # [layers, keys and values, rows, heads, capacity, width]
        self._slab = self._empty(_GRAIN)
        self._span = slice(0, 0)
        self._at: slice | Tensor = slice(0, 0)
        self._every = torch.arange(rows, device=shape.device)
        self._end = 0
        self.longest = 0  # with the tokens of the last `advance`

    @property
    def capacity(self) -> int:
        """In tokens of a row."""
        return self._slab.shape[4]

    @property
    def address(self) -> int:
        """Of the memory, which is another one when the slab has grown."""
        return self._slab.data_ptr()

    def take(self) -> Slot:
        assert len(self.slots) < self.most, "all rows are taken"
        slot = Slot(len(self.slots))
        self.slots.append(slot)
        return slot

    @torch.inference_mode()
    def leave(self, slot: Slot) -> None:
        """The last row moves into the gap."""
        last = self.slots.pop()
        if last is not slot:
            self._slab[:, :, slot.index, :, : last.length] = self._slab[
                :, :, last.index, :, : last.length
            ]
            last.index = slot.index
            self.slots[slot.index] = last

    @torch.inference_mode()
    def clear(self, slot: Slot) -> None:
        """Before `leave`, of a row that broke: others will lie there, and what is masked away is
        still multiplied."""
        self._slab[:, :, slot.index, :, : slot.length + 1] = 0

    @torch.inference_mode()
    def write(self, slot: Slot, values: Tensor) -> None:
        """Append [layers, 2, heads, n, width], computed earlier."""
        end = slot.length + values.shape[3]
        self._reserve(end)
        self._slab[:, :, slot.index, :, slot.length : end] = values
        slot.length = end

    def read(self, slot: Slot, start: int, end: int) -> Tensor:
        """A copy of [layers, 2, heads, end - start, width]."""
        assert end <= slot.length
        return self._slab[:, :, slot.index, :, start:end].clone()

    def prefill(self, slot: Slot, tokens: int) -> Tensor:
        """Make ready for `tokens` more of one row; returns the mask, [1, 1, tokens, length]."""
        start, end = slot.length, slot.length + tokens
        self._reserve(end)
        self._span = slice(slot.index, slot.index + 1)
        self._at, self._end = slice(start, end), end
        slot.length = end
        seen = torch.ones(tokens, end, dtype=torch.bool, device=self.shape.device)
        return seen.tril(start)[None, None]

    def decode(self, writing: Sequence[bool]) -> Tensor:
        """Make ready for one token of every row; returns the mask, [rows, 1, 1, longest]."""
        return self.aim(self.advance(writing), self.longest)

    def advance(self, writing: Sequence[bool]) -> Tensor:
        """Make room for one token of every row; returns where each lands, [rows].

        A row that is not writing rides along: its token lands where its next one will.
        """
        lengths = [slot.length for slot in self.slots]
        self.longest = max(lengths) + 1
        self._reserve(self.longest)
        for slot, writes in zip(self.slots, writing, strict=True):
            slot.length += int(writes)
        return torch.tensor(lengths, device=self.shape.device)

    def aim(self, at: Tensor, end: int) -> Tensor:
        """The next pass is over the front of the slab, up to `end`, and puts a token of each row at
        `at`; returns the mask, [rows, 1, 1, end]."""
        self._span, self._at, self._end = slice(0, len(at)), at, end
        return (torch.arange(end, device=at.device) <= at[:, None])[:, None, None]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Called by the attention of every layer, [rows, heads, tokens, width]."""
        found = []
        for part, fresh in zip(self._slab[layer], (keys, values), strict=True):
            rows = part[self._span]
            if isinstance(self._at, slice):
                rows[:, :, self._at] = fresh
            else:
                rows[self._every[: len(rows)], :, self._at] = fresh[:, :, 0]
            found.append(rows[:, :, : self._end])
        return found[0], found[1]

    def put(self, layer: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """The same in one call, after `decode`: [keys and values, rows, heads, 1, width]."""
        here, rows = self._slab[layer], fresh.shape[1]
        if rows == 1:
            here[:, :1, :, self._end - 1] = fresh[..., 0, :]
        else:
            here[:, self._every[:rows], :, self._at] = fresh[..., 0, :].transpose(0, 1)
        seen = here[:, :rows, :, : self._end]
        return seen[0], seen[1]

    def _reserve(self, length: int) -> None:
        have = self.capacity
        if length > have:
            old = self._slab
            self._slab = self._empty(max(2 * have, -(-length // _GRAIN) * _GRAIN))
            self._slab[..., :have, :] = old

    def _empty(self, capacity: int) -> Tensor:
        # Zeros and not just memory: what is masked away is still multiplied.
        shape = self.shape
        return torch.zeros(
            (shape.layers, 2, self.most, shape.heads, capacity, shape.width),
            dtype=shape.dtype,
            device=shape.device,
        )
