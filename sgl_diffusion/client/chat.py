"""The door to an app that chats: questions in, text and sound out as they are made."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.base.chat import ChatCard, ChatParams
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.client.door import Door
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.desk import Desk
from sgl_diffusion.orchestrator.graph import Graph
from sgl_diffusion.orchestrator.job import Asked, JobHandle, JobOutput, Snapshot
from sgl_diffusion.orchestrator.limits import Limits
from sgl_diffusion.orchestrator.topology import App

Sound = NDArray[np.float32]
# Sound and words come in many small pieces.
_CREDITS = 64


@dataclass(frozen=True)
class ScoredToken:
    """`data` is what it stands for, where `token` cannot show a part of a character."""

    token: str
    logprob: float
    data: bytes


@dataclass(frozen=True)
class TokenScore(ScoredToken):
    """A drawn token with the most likely ones in its place."""

    top: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class TextPiece:
    """New text of one choice; the last piece of a choice says why it ended. `logprobs` are of the
    tokens behind it, where they were asked for."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: tuple[TokenScore, ...] | None = None


@dataclass(frozen=True)
class SoundPiece:
    """New samples of one choice, fp32 in [-1, 1]; the last piece of a choice says why it ended."""

    index: int
    samples: Sound
    finish_reason: str | None = None


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenScore, ...] | None = None


@dataclass(frozen=True)
class Usage:
    """In tokens; `cached_tokens` of the prompt did not have to be read again. `audio_tokens` are
    frames of sound."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    audio_tokens: int = 0


@dataclass(frozen=True)
class ChatAnswer:
    """`sounds` has the samples of each choice where it was spoken and not streamed."""

    choices: tuple[Choice, ...]
    usage: Usage
    sounds: tuple[Sound, ...] = ()


class _Told:
    """How much of each choice has been handed out: characters of text, and samples."""

    def __init__(self) -> None:
        self._attempt = 1
        self._told: Counter[tuple[int, str]] = Counter()
        self._seen: Counter[tuple[int, str]] = Counter()

    def fresh(self, output: JobOutput, attempt: int) -> TextPiece | SoundPiece | None:
        """A piece without what was told by an earlier attempt; None if nothing is left of it."""
        if attempt != self._attempt:
            self._attempt = attempt
            self._seen.clear()
        sound = output.meta.get("sound")
        if sound is None:
            text = msgspec.convert(output.meta, TextPiece)
            skip = self._skip((text.index, "text"), len(text.text))
            if skip:
                text = dataclasses.replace(text, text=text.text[skip:], logprobs=None)
            return text if text.text or text.finish_reason else None
        samples = output.arrays[0]
        skip = self._skip((sound["index"], "sound"), len(samples))
        piece = SoundPiece(sound["index"], samples[skip:], sound["finish_reason"])
        return piece if len(piece.samples) or piece.finish_reason else None

    def _skip(self, what: tuple[int, str], length: int) -> int:
        skip = min(max(self._told[what] - self._seen[what], 0), length)
        self._seen[what] += length
        self._told[what] = max(self._told[what], self._seen[what])
        return skip


class ChatHandle:
    """A question on its way; dropping the handle lets it run on. With `stream` its pieces are kept
    until they are read: the first may be here before anybody asks for them."""

    def __init__(self, job: JobHandle, *, stream: bool) -> None:
        self._job = job
        self._events = job.events() if stream else None

    @property
    def id(self) -> str:
        return self._job.id

    def snapshot(self) -> Snapshot:
        """State and place in the queue at this moment."""
        return self._job.snapshot()

    async def pieces(self) -> AsyncIterator[TextPiece | SoundPiece]:
        """All that is made, of a question asked with `stream`, once; raises the job's SglError.

        A job whose worker dies begins anew and, as its seed is its own, the same way: what had come
        is left out."""
        assert self._events is not None, "the question was asked without stream"
        told = _Told()
        async for event in self._events:
            if event.kind == "output" and event.output is not None:
                piece = told.fresh(event.output, event.snapshot.attempt)
                if piece is not None:
                    yield piece
            if event.error is not None:
                raise event.error

    async def result(self) -> ChatAnswer:
        """The whole answer; raises the job's SglError. Giving up the wait cancels nothing."""
        output = await self._job.result()
        answer = msgspec.convert(output.meta, ChatAnswer)
        usage = dataclasses.replace(answer.usage, audio_tokens=output.meta.get("frames", 0))
        return dataclasses.replace(answer, usage=usage, sounds=tuple(output.arrays))

    def cancel(self) -> bool:
        """End the job now with CancelledError; False if it had ended before."""
        return self._job.cancel()


class ChatClient(Door[Desk]):
    """Lives in one event loop; it never imports torch."""

    def __init__(
        self,
        app: App,
        *,
        in_process: bool = False,
        max_queue: int = 128,
        log_level: str = "info",
        limits: Limits | None = None,
    ) -> None:
        super().__init__(
            Graph if len(app.stages) > 1 else Coordinator,
            app,
            in_process=in_process,
            max_queue=max_queue,
            log_level=log_level,
            limits=dataclasses.replace(limits or Limits(), credits=_CREDITS),
        )

    def card(self) -> ChatCard | None:
        """The served model; None until a worker was ready once."""
        fields = self._coordinator.card()
        return None if fields is None else msgspec.convert(fields, ChatCard)

    async def submit(
        self,
        params: ChatParams,
        *,
        job_id: str | None = None,
        deadline: float | None = None,
        asked: Asked | None = None,
    ) -> ChatHandle:
        """Queue a question. `deadline` is in seconds from now, `asked` is for the metrics. Raises
        RequestError, BusyError and UnavailableError."""
        params.check()
        card = self.card()
        if card is None:
            raise self._coordinator.unavailable()
        if params.speech is not None:
            voice = card.voice(params.speech.voice)
            speech = dataclasses.replace(params.speech, voice=voice)
            params = dataclasses.replace(params, speech=speech)
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
        job = await self._coordinator.submit(payload, job_id=job_id, deadline=deadline, asked=asked)
        return ChatHandle(job, stream=params.stream)
