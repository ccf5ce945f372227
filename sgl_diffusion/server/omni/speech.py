"""POST /v1/audio/speech and GET /v1/audio/voices."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sgl_diffusion.base.chat import (
    DEFAULT_VOICE,
    ChatMessage,
    ChatParams,
    Part,
    Speech,
    TextSampling,
)
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.client.chat import ChatHandle, SoundPiece, Usage
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.ids import new_id
from sgl_diffusion.server.omni.context import Context, OmniContext
from sgl_diffusion.server.omni.sound import FORMATS, SoundFile, choose, encode
from sgl_diffusion.server.omni.waiting import CLIENT_GONE, GoneError, Pieces, streamed, whole
from sgl_diffusion.server.omni.wishes import changed, new_seed, voice_name
from sgl_diffusion.server.schemas.chat import SpeechRequest
from sgl_diffusion.server.sse import PING, EventStream, frame, with_pings
from sgl_diffusion.server.validate import fingerprint, parse

router = APIRouter(prefix="/v1/audio")


@router.get("/voices")
async def voices(context: Context) -> dict[str, Any]:
    """The names that a speech can take; `default` is the first of the others."""
    names = context.card().voices
    found = [DEFAULT_VOICE, *names] if names else []
    return {
        "object": "list",
        "voices": found,
        "data": [{"id": name, "name": name} for name in found],
    }


@router.post("/speech")
async def speak(request: Request, context: Context) -> Response:
    context.check_open()
    body = await read_body(request, form=False)
    wanted = parse(SpeechRequest, body)
    body.notes.logged["prompt"] = wanted.input if body.log_prompts else fingerprint(wanted.input)
    params = _params(wanted, context)
    fallback = context.options.allow_codec_fallback
    name = choose(wanted.response_format, fallback=fallback, param="response_format")
    rate = context.card().sample_rate
    headers = {"x-audio-format": name, "x-sample-rate": str(rate)}
    try:
        handle = await context.submit(params, new_id("speech"), "speech")
        if not params.stream:
            answer = await whole(request, handle)
            work = partial(encode, answer.sounds[0], name, rate, speed=wanted.speed)
            data = await context.in_thread(work)
            headers["content-disposition"] = f'attachment; filename="speech.{name}"'
            return Response(
                data, media_type=FORMATS[name].media_type, headers=headers | _told(answer.usage)
            )
        pieces = await streamed(request, handle)
    except GoneError:
        return Response(status_code=CLIENT_GONE)
    file = SoundFile(name, rate, speed=wanted.speed)

    def close() -> None:
        handle.cancel()

    sound = _sound(context, file, pieces)
    if wanted.stream_format == "sse":
        return EventStream(_events(handle, sound), close)
    return _SoundStream(sound, close, FORMATS[name].media_type, headers)


def _params(wanted: SpeechRequest, context: OmniContext) -> ChatParams:
    """The text is the answer, word for word; how it is said the model takes from the question."""
    card = context.card()
    context.check_model(wanted.model, card)
    most = context.options.max_input_chars
    if len(wanted.input) > most:
        raise RequestError(
            f"input has {len(wanted.input)} characters; at most {most} are said at once.",
            hint="Send it in parts; the operator sets the limit with --max-input-chars.",
            code="out_of_range",
            param="input",
        )
    if not wanted.input.strip():
        raise RequestError("There is nothing to say.", code="input_empty", param="input")
    voice = voice_name(wanted.voice, "voice") or wanted.speaker or DEFAULT_VOICE
    speech = changed(
        Speech(voice=card.voice(voice)),
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        repetition_penalty=wanted.repetition_penalty,
        max_frames=wanted.max_new_tokens,
    )
    asked = f"Read this aloud, word for word: {wanted.input}"
    if wanted.instructions:
        asked = f"{wanted.instructions}\n{asked}"
    return ChatParams(
        messages=(ChatMessage(role="user", parts=(Part(text=asked),)),),
        sampling=TextSampling(seed=new_seed() if wanted.seed is None else wanted.seed),
        stream=wanted.stream or wanted.stream_format is not None,
        speech=speech,
        script=wanted.input,
    )


def _told(usage: Usage) -> dict[str, str]:
    tokens = {"prompt": usage.prompt_tokens, "completion": usage.audio_tokens}
    return {f"x-{name}-tokens": str(count) for name, count in tokens.items()}


async def _sound(
    context: OmniContext, file: SoundFile, pieces: Pieces
) -> AsyncIterator[bytes | None]:
    """The bytes of a file as they come; None where nothing has come for long."""
    async for piece in with_pings(pieces):
        if piece is None:
            yield None
        elif isinstance(piece, SoundPiece):
            data = await context.in_thread(partial(file.add, piece.samples))
            if data:
                yield data
    if rest := await context.in_thread(file.finish):
        yield rest


async def _events(handle: ChatHandle, sound: AsyncIterator[bytes | None]) -> AsyncIterator[bytes]:
    async for data in sound:
        if data is None:
            yield PING
        else:
            audio = base64.b64encode(data).decode()
            yield frame({"type": "speech.audio.delta", "audio": audio})
    usage = (await handle.result()).usage
    counted = {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.audio_tokens,
        "total_tokens": usage.prompt_tokens + usage.audio_tokens,
    }
    yield frame({"type": "speech.audio.done", "usage": counted})


class _SoundStream(StreamingResponse):
    """Sound as it is made. What fails after the first byte cuts the connection: half a file must
    not look whole."""

    def __init__(
        self,
        sound: AsyncIterator[bytes | None],
        close: Callable[[], None],
        media_type: str,
        headers: dict[str, str],
    ) -> None:
        super().__init__(_bytes(sound), media_type=media_type, headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _bytes(sound: AsyncIterator[bytes | None]) -> AsyncIterator[bytes]:
    async for data in sound:
        if data is not None:
            yield data
