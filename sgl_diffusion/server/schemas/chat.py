"""What a client may send to the routes of an omni model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sgl_diffusion.server.validate import Int, RequestBody

Name = Annotated[str, Field(max_length=512)]


class ChatRequest(RequestBody):
    """POST /v1/chat/completions"""

    neutral = {
        "chat_template": (),
        "frequency_penalty": (0,),
        "function_call": ("none",),
        "functions": ([],),
        "image_generation": (),
        "logit_bias": ({},),
        "metadata": ({},),
        "min_p": (0,),
        "parallel_tool_calls": (True, False),  # there are no tools to call
        "prediction": (),
        "presence_penalty": (0,),
        "reasoning_effort": ("none",),
        "repetition_penalty": (1,),
        "request_id": (),  # the header x-request-id
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "use_audio_in_video": (False,),
        "verbosity": ("medium",),
        "video_fps": (2,),
        "video_max_frames": (),
        "video_max_pixels": (),
        "video_min_pixels": (),
        "video_total_pixels": (),
        "web_search_options": (),
    }

    messages: list[dict[str, Any]]
    model: Name | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    stop: str | list[str] | None = None
    seed: Int | None = None
    n: Int = 1
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: Int = 0
    images: list[str] = []
    audios: list[str] = []
    videos: list[str] = []
    modalities: list[str] = ["text"]
    audio: dict[str, Any] | None = None
    stage_sampling: dict[str, Any] = {}
    stage_params: dict[str, Any] = {}
    talker_temperature: float | None = None
    talker_top_p: float | None = None
    talker_top_k: Int | None = None
    talker_repetition_penalty: float | None = None
    talker_max_new_tokens: Int | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None


class SpeechRequest(RequestBody):
    """POST /v1/audio/speech"""

    neutral = {
        "duration_tokens": (),
        "initial_codec_chunk_frames": (),
        "language": ("Auto", "auto"),
        "ref_audio": (),
        "ref_text": (),
        "references": ([],),
        "stage_params": ({},),
        "stream_codec_output": (),
        "suppress_bootstrap_silence": (),
        "task_type": (),
        "token_count": (),
        "vq_codes": (),
        "x_vector_only_mode": (False,),
    }

    input: str
    model: Name | None = None
    voice: Name | dict[str, Any] | None = None
    speaker: Name | None = None
    instructions: str | None = None
    response_format: Name = "wav"
    speed: Annotated[float, Field(ge=0.25, le=4.0)] = 1.0
    stream: bool = False
    stream_format: Literal["audio", "sse"] | None = None
    seed: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: Int | None = None


class TranscriptionRequest(RequestBody):
    """POST /v1/audio/transcriptions"""

    neutral = {
        "chunking_strategy": ("auto",),
        "include": ([],),
        "timestamp_granularities": (),
    }

    file: Any
    model: Name | None = None
    language: Annotated[str, Field(max_length=64)] | None = None
    prompt: str | None = None
    temperature: float = 0.0
    response_format: Literal["json", "text", "verbose_json"] = "json"
    stream: bool = False
    max_new_tokens: Int | None = None
    seed: Int | None = None
