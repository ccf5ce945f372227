"""The door to an app that chats: questions in, text out as it is written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from sgl_diffusion.base.chat import ChatCard, ChatParams
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.client.door import Door
from sgl_diffusion.orchestrator.job import JobHandle


@dataclass(frozen=True)
class TextPiece:
    """New text of one choice; the last piece of a choice says why it ended."""

    index: int
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class ScoredToken:
    token: str
    logprob: float


@dataclass(frozen=True)
class TokenScore(ScoredToken):
    """A drawn token with the most likely ones in its place."""

    top: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenScore, ...] | None = None


@dataclass(frozen=True)
class Usage:
    """In tokens; `cached_tokens` of the prompt did not have to be read again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class ChatAnswer:
    choices: tuple[Choice, ...]
    usage: Usage


class ChatHandle:
    """A question on its way; dropping the handle lets it run on."""

    def __init__(self, job: JobHandle) -> None:
        self._job = job

    @property
    def id(self) -> str:
        return self._job.id

    async def pieces(self) -> AsyncIterator[TextPiece]:
        """Text from now on, of a question asked with `stream`; raises the job's SglError."""
        async for event in self._job.events():
            if event.kind == "output" and event.output is not None:
                yield msgspec.convert(event.output.meta, TextPiece)
            if event.error is not None:
                raise event.error

    async def result(self) -> ChatAnswer:
        """The whole answer; raises the job's SglError. Giving up the wait cancels nothing."""
        output = await self._job.result()
        return msgspec.convert(output.meta, ChatAnswer)

    def cancel(self) -> bool:
        """End the job now with CancelledError; False if it had ended before."""
        return self._job.cancel()


class ChatClient(Door):
    """Lives in one event loop; it never imports torch."""

    def card(self) -> ChatCard | None:
        """The served model; None until a worker was ready once."""
        fields = self._coordinator.card()
        return None if fields is None else msgspec.convert(fields, ChatCard)

    async def submit(
        self, params: ChatParams, *, job_id: str | None = None, deadline: float | None = None
    ) -> ChatHandle:
        """Queue a question. `deadline` is in seconds from now. Raises RequestError, BusyError and
        UnavailableError."""
        params.check()
        card = self.card()
        if card is None:
            raise self._coordinator.unavailable()
        for index, message in enumerate(params.messages):
            strange = next((p.kind for p in message.parts if p.kind not in card.inputs), None)
            if strange is not None:
                raise RequestError(
                    f"{card.name} takes no {strange}.",
                    hint=f"It takes {', '.join(card.inputs)}.",
                    code="unsupported_parameter",
                    param=f"messages.{index}.content",
                )
        payload = {"params": msgspec.to_builtins(params)}
        job = await self._coordinator.submit(payload, job_id=job_id, deadline=deadline)
        return ChatHandle(job)
