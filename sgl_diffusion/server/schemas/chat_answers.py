"""What the routes of an omni model answer with; they build plain dicts, and tests hold these models
against real answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class PromptDetails(BaseModel):
    cached_tokens: int
    audio_tokens: int


class CompletionDetails(BaseModel):
    audio_tokens: int
    text_tokens: int
    reasoning_tokens: int


class ChatUsage(BaseModel):
    """Frames of sound are tokens, too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class SpokenAnswer(BaseModel):
    id: str
    data: str
    expires_at: int
    transcript: str


class ChatAnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    audio: SpokenAnswer | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    system_fingerprint: None


class Voice(BaseModel):
    id: str
    name: str


class Voices(BaseModel):
    object: Literal["list"]
    voices: list[str]
    data: list[Voice]


class TokenUsage(BaseModel):
    type: Literal["tokens"]
    input_tokens: int
    output_tokens: int
    total_tokens: int


class DurationUsage(BaseModel):
    type: Literal["duration"]
    seconds: float


class Transcription(BaseModel):
    """Task, language and duration are in the verbose form."""

    text: str
    usage: TokenUsage | DurationUsage
    task: Literal["transcribe"] | None = None
    language: str | None = None
    duration: float | None = None


class OmniModel(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    input_modalities: list[str]
    output_modalities: list[str]
    voices: list[str]


class OmniModels(BaseModel):
    object: Literal["list"]
    data: list[OmniModel]
