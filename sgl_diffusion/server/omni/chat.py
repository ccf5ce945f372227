"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sgl_diffusion.base.chat import ChatParams
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.client.chat import ChatHandle
from sgl_diffusion.server.body import read_body
from sgl_diffusion.server.ids import new_id
from sgl_diffusion.server.omni.chat_answer import ChatReply
from sgl_diffusion.server.omni.chat_stream import events
from sgl_diffusion.server.omni.context import Context, OmniContext
from sgl_diffusion.server.omni.media import RequestMedia
from sgl_diffusion.server.omni.messages import messages_of
from sgl_diffusion.server.omni.sound import choose
from sgl_diffusion.server.omni.waiting import CLIENT_GONE, GoneError, streamed, unless_gone, whole
from sgl_diffusion.server.omni.wishes import sampling_of, sound_format, speech_of
from sgl_diffusion.server.schemas.chat import ChatRequest
from sgl_diffusion.server.sse import EventStream
from sgl_diffusion.server.validate import fingerprint, parse

router = APIRouter()


@router.post("/v1/chat/completions")
async def complete(request: Request, context: Context) -> Response:
    context.check_open()
    body = await read_body(request, form=False)
    wanted = parse(ChatRequest, body)
    body.notes.logged["prompt"] = _logged(body.fields, shown=body.log_prompts)
    card = context.card()
    context.check_model(wanted.model, card)
    include_usage = _include_usage(wanted)
    speech = speech_of(wanted, card)
    form = "wav"
    if speech is not None:
        fallback = context.options.allow_codec_fallback
        form = choose(sound_format(wanted), fallback=fallback, param="audio.format")
    reply = ChatReply(
        new_id("chatcmpl"), context.model_name(card), wanted, speech, form, card.sample_rate
    )
    params = ChatParams(
        messages=(), sampling=sampling_of(wanted), n=wanted.n, stream=wanted.stream, speech=speech
    )
    media = RequestMedia(context)
    taken = False
    try:
        handle = await unless_gone(request, _submit(context, wanted, params, media, reply.id))
        if not wanted.stream:
            answer = await whole(request, handle)
            data = await context.in_thread(partial(reply.body, answer))
            headers = {} if speech is None else {"x-audio-format": form}
            return JSONResponse(data, headers=headers)
        pieces = await streamed(request, handle)
        taken = True

        def close() -> None:
            handle.cancel()
            media.remove()

        return EventStream(events(reply, handle, pieces, include_usage), close)
    except GoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        if not taken:
            media.remove()


async def _submit(
    context: OmniContext,
    wanted: ChatRequest,
    params: ChatParams,
    media: RequestMedia,
    job_id: str,
) -> ChatHandle:
    messages = await messages_of(wanted, media)
    return await context.submit(replace(params, messages=messages), job_id, "chat")


def _include_usage(wanted: ChatRequest) -> bool:
    options = wanted.stream_options
    if options is None:
        return False
    if not wanted.stream:
        raise RequestError(
            "stream_options needs stream.",
            hint="Send stream=true with it.",
            code="conflicting_parameters",
            param="stream_options",
        )
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise RequestError(
                "stream_options knows include_usage.",
                code="unknown_parameter",
                param="stream_options",
            )
    given = options.get("include_usage", False)
    if not isinstance(given, bool):
        raise RequestError(
            "include_usage must be true or false.",
            code="invalid_type",
            param="stream_options.include_usage",
        )
    return given


def _logged(fields: dict[str, object], *, shown: bool) -> str:
    text = repr(fields.get("messages"))
    return text if shown else fingerprint(text)
