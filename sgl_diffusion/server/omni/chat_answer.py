"""The bodies of a chat: the whole answer, and what the chunks of a stream share."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_diffusion.base.chat import Speech
from sgl_diffusion.client.chat import ChatAnswer, Choice, ScoredToken, TokenScore, Usage
from sgl_diffusion.server.omni.sound import encode
from sgl_diffusion.server.schemas.chat import ChatRequest

AUDIO_SECONDS = 3600  # OpenAI's answers say until when their sound can be named; ours holds it


@dataclass(frozen=True)
class ChatReply:
    """One request on its way back; `form` is the format of its sound."""

    id: str
    model: str
    wanted: ChatRequest
    speech: Speech | None
    form: str
    rate: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def shows_text(self) -> bool:
        return "text" in self.wanted.modalities

    def audio_id(self, index: int) -> str:
        return f"audio_{self.id}_{index}"

    @property
    def expires_at(self) -> int:
        return self.created + AUDIO_SECONDS

    def body(self, answer: ChatAnswer) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(choice, answer) for choice in answer.choices],
            "usage": usage_of(answer.usage),
            "system_fingerprint": None,
        }

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if usage is not None:
            found["usage"] = usage_of(usage)
        return found

    def _choice(self, choice: Choice, answer: ChatAnswer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        if self.shows_text:
            message["content"] = choice.text
        reason = choice.finish_reason
        if self.speech is not None:
            samples = answer.sounds[choice.index]
            data = encode(samples, self.form, self.rate)
            message["audio"] = {
                "id": self.audio_id(choice.index),
                "data": base64.b64encode(data).decode(),
                "expires_at": self.expires_at,
                "transcript": choice.text,
            }
        logprobs = logprobs_of(choice.logprobs)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": reason,
        }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Frames of sound are tokens of the talker, and count as such."""
    completion = usage.completion_tokens + usage.audio_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": usage.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "audio_tokens": usage.audio_tokens,
            "text_tokens": usage.completion_tokens,
            "reasoning_tokens": 0,
        },
    }


def logprobs_of(scores: Sequence[TokenScore] | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {"content": [_score(score) for score in scores], "refusal": None}


def _score(score: TokenScore) -> dict[str, Any]:
    return {
        **_scored(score),
        "top_logprobs": [_scored(each) for each in score.top],
    }


def _scored(score: ScoredToken) -> dict[str, Any]:
    return {"token": score.token, "logprob": score.logprob, "bytes": list(score.data)}
