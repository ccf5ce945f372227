"""What is asked of a model that chats: messages, and how the answer is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sgl_diffusion.base.errors import RequestError

Kind = Literal["text", "image", "audio", "video"]
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 4
ROLES = ("system", "user", "assistant")
DEFAULT_VOICE = "default"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a message: `text`, or of another kind the `path` of a file."""

    kind: Kind = "text"
    text: str = ""
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class TextSampling:
    """How tokens are drawn; at temperature 0 the most likely one is taken."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0

    def check(self) -> None:
        """Raises a RequestError that names the parameter."""
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("top_k", self.top_k, 0, 1 << 20)
        _within("seed", self.seed, 0, (1 << 63) - 1)
        _within("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.top_p == 0.0:
            raise RequestError("top_p has to be above 0.", param="top_p")
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 1 << 20)
        if len(self.stop) > MAX_STOPS or "" in self.stop:
            raise RequestError(
                f"stop takes up to {MAX_STOPS} texts, none of them empty.", param="stop"
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs.", param="top_logprobs")


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How an answer is spoken. `temperature` and the cuts are for the codes of sound; what is None
    is as the model is used to. `max_frames` ends it, where its text has not."""

    voice: str = DEFAULT_VOICE
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_frames: int = 4096

    def check(self) -> None:
        """Raises a RequestError that names the parameter."""
        stage = "stage_sampling.talker"
        _within(f"{stage}.temperature", self.temperature, 0.0, 2.0)
        _within(f"{stage}.top_p", self.top_p, 0.0, 1.0)
        _within(f"{stage}.top_k", self.top_k, 0, 1 << 20)
        _within(f"{stage}.repetition_penalty", self.repetition_penalty, 1.0, 2.0)
        _within(f"{stage}.max_tokens", self.max_frames, 1, 1 << 15)
        if self.top_p == 0.0:
            raise RequestError("top_p has to be above 0.", param=f"{stage}.top_p")


@dataclass(frozen=True, kw_only=True)
class ChatParams:
    """A whole request. Choice i of `n` uses seed + i; with `stream` text and sound are sent as they
    come. With `speech` the answer is spoken, too; `script` is the answer word for word, where it is
    given and not written by the model."""

    messages: tuple[ChatMessage, ...]
    sampling: TextSampling = TextSampling()
    n: int = 1
    stream: bool = False
    speech: Speech | None = None
    script: str | None = None

    def check(self) -> None:
        """Raises a RequestError that names the parameter."""
        _within("n", self.n, 1, MAX_CHOICES)
        self.sampling.check()
        if not self.messages:
            raise RequestError("messages is empty.", param="messages")
        for index, message in enumerate(self.messages):
            if message.role not in ROLES:
                raise RequestError(
                    f"There is no role {message.role!r}.",
                    hint=f"Roles are {', '.join(ROLES)}.",
                    param=f"messages.{index}.role",
                )
            if message.role != "user" and any(part.kind != "text" for part in message.parts):
                raise RequestError(
                    f"A message of the role {message.role} holds media.",
                    hint="Send them in a message of the user.",
                    param=f"messages.{index}.content",
                )
        if self.speech is not None:
            self.speech.check()
        if self.script is not None and (self.speech is None or not self.script.strip()):
            raise RequestError("There is nothing to say.", code="input_empty", param="input")


@dataclass(frozen=True, kw_only=True)
class ChatCard:
    """What the served model can do. `context_length` is in tokens, prompt and answer; a model
    without `voices` does not speak. The first voice is the default one."""

    name: str
    context_length: int
    inputs: tuple[str, ...]
    voices: tuple[str, ...] = ()
    sample_rate: int = 0

    def voice(self, asked: str) -> str:
        """The name of a voice, however it is spelled; RequestError if there is none such."""
        if not self.voices:
            raise RequestError(
                f"{self.name} does not speak.",
                hint="Ask for text only.",
                code="unsupported_parameter",
                param="modalities",
            )
        if asked == DEFAULT_VOICE:
            return self.voices[0]
        known = {voice.lower(): voice for voice in self.voices}
        if asked.lower() not in known:
            raise RequestError(
                "There is no such voice.",
                hint=f"There are {', '.join((DEFAULT_VOICE, *self.voices))}.",
                code="voice_not_found",
                param="voice",
            )
        return known[asked.lower()]


def _within(param: str, value: float | None, least: float, most: float) -> None:
    # Written so that NaN does not pass.
    if value is not None and not least <= value <= most:
        raise RequestError(f"{param} is {value}; it goes from {least} to {most}.", param=param)
