"""What was computed for the beginnings of earlier prompts, kept for prompts that begin the same.

A prompt is cut into blocks of tokens. A block is known by all that came before it: the hash of a
block covers the hash of the one before, its tokens, and for tokens of media the digest of the
file's features. So a system prompt, or a picture that is asked about twice, is computed once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

BLOCK = 32


def block_keys(tokens: Sequence[int], marks: dict[int, bytes]) -> list[bytes]:
    """The keys of the whole blocks of a prompt. `marks` gives, by position, the digest of the media
    whose tokens begin there; of such tokens the ids say nothing."""
    keys: list[bytes] = []
    before = b""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        state = hashlib.blake2b(before, digest_size=16)
        for at in range(start, start + BLOCK):
            state.update(tokens[at].to_bytes(4, "little"))
            if at in marks:
                state.update(marks[at])
        before = state.digest()
        keys.append(before)
    return keys


class PrefixStore:
    """Blocks of keys and values within a budget of bytes; what was not used for longest goes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        self.bytes = 0
        self.reused_tokens = 0

    def longest(self, keys: Sequence[bytes]) -> list[Tensor]:
        """The blocks from the first one on, up to one that is not there."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            found.append(block)
        self.reused_tokens += len(found) * BLOCK
        return found

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def put(self, key: bytes, block: Tensor) -> None:
        if key in self._blocks or block.nbytes > self._budget:
            return
        self._blocks[key] = block
        self.bytes += block.nbytes
        while self.bytes > self._budget:
            _, old = self._blocks.popitem(last=False)
            self.bytes -= old.nbytes
