"""One answer under way, and the job that it is a part of."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sgl_diffusion.ar.kv import Slot
from sgl_diffusion.ar.prompt import Prompt
from sgl_diffusion.ar.sampling import Draw, Drawn
from sgl_diffusion.ar.senses import Medium
from sgl_diffusion.ar.thinker import Passage
from sgl_diffusion.ar.towers import Felt
from sgl_diffusion.ar.writing import Writing
from sgl_diffusion.base.chat import ChatParams


@dataclass(eq=False)
class ChatJob:
    """A request with its media; it gets a prompt, then rows, one for each choice."""

    id: str
    params: ChatParams
    media: list[Medium]
    felt: list[Felt]
    prompt: Prompt | None = None
    rows: list[Row] = field(default_factory=list)

    def done(self) -> bool:
        return all(row.finish_reason is not None for row in self.rows)

    def usage(self) -> dict[str, int]:
        assert self.prompt is not None
        return {
            "prompt_tokens": len(self.prompt.tokens),
            "completion_tokens": sum(len(row.drawn) for row in self.rows),
            "cached_tokens": max(row.reused for row in self.rows),
        }


@dataclass(eq=False)
class Row:
    """One choice of a job. `last` is drawn but not read by the model yet; None before the first.
    A `script` stands behind the prompt in the passage, and is read instead of written.

    Where it is `spoken`, `unsaid` are the tokens whose text is not settled, `unspoken` those that
    wait for what the talker needs of them, and `states` what the thinker made of the next ones."""

    job: ChatJob
    index: int
    passage: Passage
    keys: list[bytes]
    draw: Draw
    writing: Writing
    most: int
    slot: Slot | None = None
    reused: int = 0
    drawn: list[Drawn] = field(default_factory=list)
    told: int = 0
    finish_reason: str | None = None
    unsaid: list[int] = field(default_factory=list)
    script: tuple[int, ...] = ()
    spoken: bool = False
    speaking: bool = False
    unspoken: deque[int] = field(default_factory=deque)
    states: deque[Tensor] = field(default_factory=deque)

    @property
    def last(self) -> int | None:
        return self.drawn[-1].token if self.drawn else None

    def left_to_read(self) -> int:
        assert self.slot is not None
        return len(self.passage.vectors) - self.slot.length

    def take(self, drawn: Drawn, ends: frozenset[int]) -> str:
        """Note a token; returns the text that it brings."""
        self.drawn.append(drawn)
        text = ""
        if drawn.token in ends:
            self.finish_reason = "stop"
        else:
            self.unsaid.append(drawn.token)
            text = self.writing.add(drawn.token)
            if self.writing.stopped:
                self.finish_reason = "stop"
            elif len(self.drawn) >= self.most:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self.writing.finish()
        return text

    def words(self) -> list[int]:
        """The tokens to say now: those whose text is shown, and not held back or cut off."""
        if self.writing.held():
            return []
        words = [] if self.writing.stopped else self.unsaid
        self.unsaid = []
        return words

    def recite(self, tokens: Sequence[int]) -> str:
        """Take a given text as the answer; returns it."""
        for token in tokens:
            self.drawn.append(Drawn(token))
            self.unsaid.append(token)
            self.writing.add(token)
        self.writing.finish()
        self.finish_reason = "stop"
        return self.writing.text

    def answer(self, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": self.writing.text,
            "tokens": [drawn.token for drawn in self.drawn],
            "finish_reason": self.finish_reason,
            "logprobs": logprobs,
        }
