"""Tokens to text as they come, held back where the end of the text is not settled yet."""

from __future__ import annotations

from functools import cache
from typing import Any

_BROKEN = "\ufffd"
# A character has at most four bytes: if it is broken after so many tokens, it stays so.
_PATIENCE = 8


@cache
def _bytes_by_sign() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {sign: byte for byte, sign in bytes_to_unicode().items()}


def bytes_of(tokenizer: Any, token: int) -> bytes:
    """What a token stands for, which may be a part of a character; nothing where a vocabulary is
    larger than its tokenizer. Those of both families are made of bytes."""
    if token in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[token].content).encode()
    return bytes(_bytes_by_sign()[sign] for sign in tokenizer.convert_ids_to_tokens(token) or "")


class Writing:
    """The answer of one row so far. `add` returns what can be shown for good; a stop text, and all
    behind it, is never shown."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._settled = ""
        self._pending: list[int] = []
        self._context: list[int] = []
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All that may be shown when nothing more comes."""
        return self._settled

    def add(self, token: int) -> str:
        """One more token; returns new text."""
        self._pending.append(token)
        fresh = self._fresh()
        # A character may need more tokens.
        if fresh.endswith(_BROKEN) and len(self._pending) < _PATIENCE:
            return ""
        self._settle(fresh)
        return self._show(len(self._settled) - self.held())

    def finish(self) -> str:
        """No more tokens; returns the rest."""
        if self._pending and not self.stopped:
            self._settle(self._fresh())
        return self._show(len(self._settled))

    def _fresh(self) -> str:
        """The text of the pending tokens. A token's text may depend on the one before."""
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _settle(self, fresh: str) -> None:
        start = len(self._settled)
        self._settled += fresh
        self._context, self._pending = self._pending, []
        places = [
            place
            for stop in self._stops
            if (place := self._settled.find(stop, max(0, start - len(stop) + 1))) >= 0
        ]
        if places:
            self._settled = self._settled[: min(places)]
            self.stopped = True

    def held(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        if self.stopped:
            return 0
        text = self._settled[self._shown :]
        lengths = [
            size
            for stop in self._stops
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        ]
        return max(lengths, default=0)

    def _show(self, end: int) -> str:
        fresh = self._settled[self._shown : end]
        self._shown = max(self._shown, end)
        return fresh

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
