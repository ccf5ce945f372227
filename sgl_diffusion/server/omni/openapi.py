"""/openapi.json of an omni server: its routes, and what its own code knows of their fields."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from sgl_diffusion.base.chat import MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS
from sgl_diffusion.server.omni.context import Context
from sgl_diffusion.server.omni.messages import MAX_MESSAGES, SOUND_TYPES
from sgl_diffusion.server.omni.sound import FORMATS
from sgl_diffusion.server.omni.wishes import MODALITIES
from sgl_diffusion.server.openapi import Surface, document
from sgl_diffusion.server.operations import FORM, Operation
from sgl_diffusion.server.schemas import answers, chat_answers
from sgl_diffusion.server.schemas.chat import ChatRequest, SpeechRequest, TranscriptionRequest

router = APIRouter()

Schema = dict[str, Any]

_MODEL_ERRORS = (404,)
OPERATIONS: dict[str, Operation] = {
    "GET /livez": Operation("The server process answers.", answer=answers.Status, public=True),
    "GET /liveness": Operation("The same under another name.", answer=answers.Status),
    "GET /readyz": Operation(
        "A request would be answered now.", answer=answers.Status, public=True
    ),
    "GET /health": Operation("The same as /readyz.", answer=answers.Status, public=True),
    "GET /metrics": Operation("Prometheus text.", media=("text/plain",)),
    "GET /v1/models": Operation("OpenAI's list.", answer=chat_answers.OmniModels),
    "GET /v1/models/{model_id}": Operation(
        "One of the list.", answer=chat_answers.OmniModel, errors=_MODEL_ERRORS
    ),
    "POST /v1/chat/completions": Operation(
        "Answer a chat, in text and sound.",
        ChatRequest,
        answer=chat_answers.ChatCompletion,
        media=("application/json", "text/event-stream"),
        errors=_MODEL_ERRORS,
    ),
    "POST /v1/audio/speech": Operation(
        "Read a text aloud.",
        SpeechRequest,
        media=(*sorted({kind.media_type for kind in FORMATS.values()}), "text/event-stream"),
        errors=_MODEL_ERRORS,
    ),
    "GET /v1/audio/voices": Operation("The voices that read aloud.", answer=chat_answers.Voices),
    "POST /v1/audio/transcriptions": Operation(
        "Write down what is said.",
        TranscriptionRequest,
        kinds=(FORM,),
        answer=chat_answers.Transcription,
        media=("application/json", "text/plain", "text/event-stream"),
        errors=_MODEL_ERRORS,
    ),
    "GET /openapi.json": Operation("This document.", answer={"type": "object"}),
}


def _object(properties: dict[str, Schema], *required: str, closed: bool = True) -> Schema:
    found: Schema = {"type": "object", "properties": properties, "required": list(required)}
    return found | ({"additionalProperties": False} if closed else {})


def _may(properties: dict[str, Schema]) -> Schema:
    """All may be left out, or null."""
    null: Schema = {"type": "null"}
    return _object({name: {"anyOf": [each, null]} for name, each in properties.items()})


_TEXT: Schema = {"type": "string"}
_LENGTH: Schema = {"type": "integer", "minimum": 1, "maximum": 1 << 15}
_HEAT: Schema = {"type": "number", "minimum": 0, "maximum": 2}
_SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_CUT: Schema = {"type": "integer", "minimum": -1, "maximum": 1 << 20}
_PENALTY: Schema = {"type": "number", "minimum": 1, "maximum": 2}
_SEED: Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}
_VOICE: Schema = {
    "anyOf": [{**_TEXT, "maxLength": 512}, _object({"id": _TEXT}, "id", closed=False)]
}


def _part(kind: str, value: Schema) -> Schema:
    return _object({"type": {"const": kind}, kind: value}, "type", kind, closed=False)


def _medium(kind: str) -> Schema:
    return _part(kind, {"anyOf": [_TEXT, _object({"url": _TEXT}, "url", closed=False)]})


_WRITTEN = _part("text", _TEXT)
_SOUND = _object({"data": _TEXT, "format": {"enum": list(SOUND_TYPES)}}, "data", "format")
_PARTS = [
    _WRITTEN,
    *(_medium(kind) for kind in ("image_url", "audio_url", "video_url")),
    _part("input_audio", {**_SOUND, "additionalProperties": True}),
]


def _message(roles: list[str], parts: list[Schema], *more: Schema) -> Schema:
    content = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": parts}}, *more]}
    required = ("role",) if more else ("role", "content")
    return _object({"role": {"enum": roles}, "content": content}, *required)


_STOP: Schema = {
    "anyOf": [
        {**_TEXT, "minLength": 1},
        {"type": "array", "items": {**_TEXT, "minLength": 1}, "maxItems": MAX_STOPS},
    ]
}
_STAGES = _may(
    {
        "thinker": _may(
            {
                "temperature": _HEAT,
                "top_p": _SHARE,
                "top_k": _CUT,
                "seed": _SEED,
                "stop": _STOP,
                "max_tokens": _LENGTH,
                "max_new_tokens": _LENGTH,
            }
        ),
        "talker": _may(
            {
                "temperature": _HEAT,
                "top_p": _SHARE,
                "top_k": _CUT,
                "repetition_penalty": _PENALTY,
                "max_tokens": _LENGTH,
                "max_new_tokens": _LENGTH,
            }
        ),
    }
)
_OTHER: dict[str, Schema] = {
    "messages": {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_MESSAGES,
        "items": {
            "anyOf": [
                _message(["user"], _PARTS),
                _message(["system", "developer"], [_WRITTEN]),
                _message(["assistant"], [_WRITTEN], {"type": "null"}),
            ]
        },
    },
    "stop": _STOP,
    "stream_options": _object(
        {"include_usage": {"type": "boolean"}, "include_obfuscation": {"type": "boolean"}}
    ),
    "modalities": {"type": "array", "items": {"enum": list(MODALITIES)}, "minItems": 1},
    "audio": _object({"voice": _VOICE, "format": {"enum": ["pcm16", *FORMATS]}}),
    "stage_sampling": _STAGES,
    "stage_params": _may({"thinker": _object({}), "talker": _may({"voice": _VOICE})}),
    "voice": _VOICE,
    "response_format": {"enum": list(FORMATS)},
}
_NARROWER: dict[str, Schema] = {
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 1 << 20},
    "repetition_penalty": {"minimum": 1, "maximum": 2},
    "seed": {"minimum": 0, "maximum": (1 << 63) - 1},
    "max_tokens": {"minimum": 1, "maximum": 1 << 20},
    "max_completion_tokens": {"minimum": 1, "maximum": 1 << 20},
    "max_new_tokens": {"minimum": 1, "maximum": 1 << 15},
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "top_logprobs": {"minimum": 0, "maximum": MAX_TOP_LOGPROBS},
    "input": {"minLength": 1, "maxLength": 4096},
    "talker_temperature": {"minimum": 0, "maximum": 2},
    "talker_top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "talker_top_k": {"minimum": -1, "maximum": 1 << 20},
    "talker_repetition_penalty": {"minimum": 1, "maximum": 2},
    "talker_max_new_tokens": {"minimum": 1, "maximum": 1 << 15},
}


def _either(*ways: Schema) -> Schema:
    return {"anyOf": list(ways)}


def _given(field: str, value: Schema) -> Schema:
    """A field is there and is `value`."""
    return {"properties": {field: value}, "required": [field]}


def _absent_or(field: str, value: Schema) -> Schema:
    """A field is not there, or is `value`."""
    return {"properties": {field: value}}


_SILENT = _absent_or("stream", {"enum": [False, None]})
_TOGETHER: dict[str, list[Schema]] = {
    "ChatRequest": [
        _either(_given("stream", {"const": True}), _absent_or("stream_options", {"type": "null"})),
        _either(
            _given("logprobs", {"const": True}), _absent_or("top_logprobs", {"enum": [0, None]})
        ),
        _either(
            _given("modalities", {"type": "array", "contains": {"const": "audio"}}),
            _absent_or("audio", {"enum": [{}, None]}),
        ),
        _either(_SILENT, _absent_or("audio", _absent_or("format", {"enum": ["pcm16", "pcm"]}))),
    ],
    "TranscriptionRequest": [
        _either(_SILENT, _absent_or("response_format", {"enum": ["json", "text", None]})),
    ],
}
OMNI = Surface(
    title="sgl_diffusion omni",
    operations=OPERATIONS,
    narrower=_NARROWER,
    other=_OTHER,
    form={"file": {"type": "string", "format": "binary"}},
    together=_TOGETHER,
)


@router.get("/openapi.json")
async def openapi(context: Context) -> JSONResponse:
    return JSONResponse(document(OMNI, secured=context.settings.keys.required))
