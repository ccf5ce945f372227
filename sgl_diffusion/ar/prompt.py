"""From messages to the tokens a model reads, with one token for each vector of a medium."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_diffusion.ar.senses import Medium
from sgl_diffusion.base.chat import ChatMessage, Part
from sgl_diffusion.base.errors import RequestError, SetupError


@dataclass(frozen=True, eq=False)
class Prompt:
    """`media` stand in the order of their tokens; `marks` has their digests by the position of
    their first token."""

    tokens: list[int]
    media: Sequence[Medium]
    marks: dict[int, bytes]


class Reader:
    """The tokenizer and the chat template of a checkpoint; `places` has the placeholder of each
    kind of media."""

    def __init__(self, tokenizer: Any, places: dict[str, int]) -> None:
        self.tokenizer = tokenizer
        self._places = places
        added = tokenizer.added_tokens_decoder.values()
        self._control = [token.content for token in added if token.special]

    @classmethod
    def load(cls, folder: Path, places: dict[str, int]) -> Reader:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise SetupError(
                f"{folder} holds no tokenizer that can be loaded ({type(error).__name__}).",
                hint="Check that the download is complete.",
            ) from error
        if not tokenizer.chat_template:
            raise SetupError(
                f"The tokenizer in {folder} has no chat template.",
                hint="Check that chat_template.jinja or chat_template.json is there.",
            )
        return cls(tokenizer, places)

    def read(
        self, messages: Sequence[ChatMessage], media: Sequence[Medium], counts: Sequence[int]
    ) -> Prompt:
        """`media` of the messages in their order, and how many vectors each has."""
        return expand(self.tokens(messages), self._places, media, counts)

    def tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """With one placeholder for each medium."""
        tokens: list[int] = self.tokenizer.apply_chat_template(
            [self._plain(index, message) for index, message in enumerate(messages)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return tokens

    def words(self, text: str) -> list[int]:
        """The tokens of a text that stands for itself."""
        self._check_plain(text, "input")
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def _plain(self, index: int, message: ChatMessage) -> dict[str, Any]:
        return {
            "role": message.role,
            "content": [self._piece(index, part) for part in message.parts],
        }

    def _piece(self, index: int, part: Part) -> dict[str, str]:
        if part.kind != "text":
            return {"type": part.kind, part.kind: part.path}
        self._check_plain(part.text, f"messages.{index}.content")
        return {"type": "text", "text": part.text}

    def _check_plain(self, text: str, param: str) -> None:
        found = next((word for word in self._control if word in text), None)
        if found is not None:
            raise RequestError(
                f"The text holds {found}, which steers the model.",
                hint="Leave it out, or write it with a space inside.",
                code="control_token",
                param=param,
            )


def expand(
    tokens: Sequence[int],
    places: Mapping[str, int],
    media: Sequence[Medium],
    counts: Sequence[int],
) -> Prompt:
    """Each placeholder as often as its medium has vectors."""
    kinds = {token: kind for kind, token in places.items()}
    waiting = deque(zip(media, counts, strict=True))
    expanded: list[int] = []
    marks: dict[int, bytes] = {}
    for token in tokens:
        kind = kinds.get(token)
        if kind is None:
            expanded.append(token)
            continue
        medium, count = waiting.popleft()
        assert medium.kind == kind, "the chat template keeps the order of parts"
        marks[len(expanded)] = medium.digest
        expanded += [token] * count
    assert not waiting, "the chat template has a place for every part"
    return Prompt(expanded, media, marks)
