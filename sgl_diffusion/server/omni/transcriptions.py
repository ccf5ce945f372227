"""POST /v1/audio/transcriptions: the model writes down what it hears."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from sgl_diffusion.base.chat import ChatMessage, ChatParams, Part, TextSampling
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.client.chat import ChatAnswer, ChatHandle, SoundPiece
from sgl_diffusion.server.body import Body, read_body
from sgl_diffusion.server.ids import new_id
from sgl_diffusion.server.omni.chat_answer import usage_of
from sgl_diffusion.server.omni.context import Context, OmniContext
from sgl_diffusion.server.omni.media import RequestMedia
from sgl_diffusion.server.omni.waiting import CLIENT_GONE, GoneError, Pieces, streamed, whole
from sgl_diffusion.server.omni.wishes import new_seed
from sgl_diffusion.server.schemas.chat import TranscriptionRequest
from sgl_diffusion.server.sse import PING, EventStream, frame, with_pings
from sgl_diffusion.server.validate import parse

router = APIRouter(prefix="/v1/audio")


@router.post("/transcriptions")
async def transcribe(request: Request, context: Context) -> Response:
    context.check_open()
    body = await read_body(request, form=True, plain=False)
    media = RequestMedia(context)
    taken = False
    try:
        try:
            wanted = _wanted(body)
            handle = await _submit(context, wanted, media)
        finally:
            await body.close()
        if not wanted.stream:
            answer = await whole(request, handle)
            return _respond(wanted, answer, media.seconds)
        pieces = await streamed(request, handle)
        taken = True

        def close() -> None:
            handle.cancel()
            media.remove()

        return EventStream(_events(handle, pieces), close)
    except GoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        if not taken:
            media.remove()


def _wanted(body: Body) -> TranscriptionRequest:
    wanted = parse(TranscriptionRequest, body)
    if isinstance(wanted.file, str):
        raise RequestError("file must be a file.", code="file_expected", param="file")
    if wanted.stream and wanted.response_format == "verbose_json":
        raise RequestError(
            "A stream has no verbose form.", code="conflicting_parameters", param="response_format"
        )
    return wanted


async def _submit(
    context: OmniContext, wanted: TranscriptionRequest, media: RequestMedia
) -> ChatHandle:
    card = context.card()
    context.check_model(wanted.model, card)
    if "audio" not in card.inputs:
        raise RequestError(f"{card.name} does not hear.", code="unsupported_parameter")
    heard = await media.put("audio", wanted.file, "file")
    asked = "Write down what is said, word for word, and nothing else."
    if wanted.language:
        asked += f" The language is {wanted.language}."
    if wanted.prompt:
        asked += f" {wanted.prompt}"
    message = ChatMessage(role="user", parts=(heard, Part(text=asked)))
    sampling = TextSampling(
        temperature=wanted.temperature,
        seed=new_seed() if wanted.seed is None else wanted.seed,
        max_tokens=wanted.max_new_tokens,
    )
    params = ChatParams(messages=(message,), sampling=sampling, stream=wanted.stream)
    return await context.submit(params, new_id("transcript"), "transcription")


def _respond(wanted: TranscriptionRequest, answer: ChatAnswer, seconds: float) -> Response:
    text = answer.choices[0].text
    if wanted.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    if wanted.response_format == "json":
        return JSONResponse({"text": text, "usage": _usage(answer)})
    found = {
        "task": "transcribe",
        "language": wanted.language or "",
        "duration": seconds,
        "text": text,
        "usage": {"type": "duration", "seconds": seconds},
    }
    return JSONResponse(found)


def _usage(answer: ChatAnswer) -> dict[str, Any]:
    counted = usage_of(answer.usage)
    return {
        "type": "tokens",
        "input_tokens": counted["prompt_tokens"],
        "output_tokens": counted["completion_tokens"],
        "total_tokens": counted["total_tokens"],
    }


async def _events(handle: ChatHandle, pieces: Pieces) -> AsyncIterator[bytes]:
    async for piece in with_pings(pieces):
        if piece is None:
            yield PING
        elif not isinstance(piece, SoundPiece) and piece.text:
            yield frame({"type": "transcript.text.delta", "delta": piece.text})
    answer = await handle.result()
    text = answer.choices[0].text
    yield frame({"type": "transcript.text.done", "text": text, "usage": _usage(answer)})
