"""From the messages of a chat request to those of the engine, with their media put down."""

from __future__ import annotations

from typing import Any

from sgl_diffusion.base.chat import ROLES, ChatMessage, Kind, Part
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.omni.media import RequestMedia
from sgl_diffusion.server.schemas.chat import ChatRequest

MAX_MESSAGES = 1000
# Fields of an answer that clients send back as they got it, where they say nothing.
_EMPTY = ("refusal", "tool_calls", "function_call", "annotations", "name", "reasoning_content")
_URL_PARTS: dict[str, Kind] = {
    "image_url": "image",
    "audio_url": "audio",
    "video_url": "video",
}
_PARTS = ("text", *_URL_PARTS, "input_audio")
SOUND_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg", "flac": "audio/flac", "opus": "audio/ogg"}


async def messages_of(wanted: ChatRequest, media: RequestMedia) -> tuple[ChatMessage, ...]:
    """Checked texts first, then the media, in their order: nothing is fetched for a request that
    is wrong."""
    if len(wanted.messages) > MAX_MESSAGES:
        raise RequestError(
            f"messages holds more than {MAX_MESSAGES}.", code="out_of_range", param="messages"
        )
    read = [_message(index, given) for index, given in enumerate(wanted.messages)]
    _append_lists(wanted, read)
    found = []
    for role, parts in read:
        done = [
            part if isinstance(part, Part) else await media.put(part[0], part[1], part[2])
            for part in parts
        ]
        found.append(ChatMessage(role=role, parts=tuple(done)))
    return tuple(found)


_Wanted = tuple[Kind, Any, str]  # kind, source, path of the field


def _message(index: int, given: dict[str, Any]) -> tuple[str, list[Part | _Wanted]]:
    where = f"messages.{index}"
    role = given.get("role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        raise RequestError(
            "There is no such role." if role is not None else "A message has a role.",
            hint=f"Roles are {', '.join((*ROLES, 'developer'))}.",
            code="missing_parameter" if role is None else "invalid_value",
            param=f"{where}.role",
        )
    known = {"role", "content", *_EMPTY} | ({"audio"} if role == "assistant" else set())
    for name, value in given.items():
        if name not in known or (name in _EMPTY and value not in (None, [], "")):
            shown = "".join(c for c in name[:64] if c.isprintable())
            raise RequestError(
                f"A message of this server has no {shown!r}.",
                hint="It has role and content.",
                code="unsupported_parameter",
                param=f"{where}.{shown}",
            )
    content = given.get("content")
    if content is None and role == "assistant":
        content = _transcript(given.get("audio"), where)
    return role, _content(content, f"{where}.content")


def _transcript(audio: Any, where: str) -> str:
    """A spoken answer of before is what was said. Nothing at all is an empty answer."""
    if audio is None:
        return ""
    told = audio.get("transcript") if isinstance(audio, dict) else None
    if not isinstance(told, str):
        raise RequestError(
            "This server keeps no spoken answers.",
            hint="Send audio back with its transcript, or the transcript as content.",
            code="missing_parameter",
            param=f"{where}.audio.transcript",
        )
    return told


def _content(content: Any, where: str) -> list[Part | _Wanted]:
    if isinstance(content, str):
        return [Part(text=content)]
    if not isinstance(content, list):
        raise RequestError(
            "content is a text or a list of parts.", code="invalid_type", param=where
        )
    return [_part(given, f"{where}.{index}") for index, given in enumerate(content)]


def _part(given: Any, where: str) -> Part | _Wanted:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in _PARTS:
        raise RequestError(
            "There is no such part of a message.",
            hint=f"Parts are {', '.join(_PARTS)}.",
            code="invalid_value",
            param=f"{where}.type",
        )
    value, path = given.get(kind), f"{where}.{kind}"
    if kind == "text":
        if not isinstance(value, str):
            raise RequestError("text must be a text.", code="invalid_type", param=path)
        return Part(text=value)
    if kind == "input_audio":
        return "audio", _input_audio(value, path), path
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise RequestError(f"{kind} has a url.", code="missing_parameter", param=f"{path}.url")
    return _URL_PARTS[kind], url, path


def _input_audio(value: Any, path: str) -> str:
    data = value.get("data") if isinstance(value, dict) else None
    kind = value.get("format") if isinstance(value, dict) else None
    if not isinstance(data, str):
        raise RequestError(
            "input_audio has data, base64.", code="missing_parameter", param=f"{path}.data"
        )
    if kind not in SOUND_TYPES:
        raise RequestError(
            "input_audio has a format.",
            hint=f"Formats are {', '.join(SOUND_TYPES)}.",
            code="invalid_value",
            param=f"{path}.format",
        )
    return f"data:{SOUND_TYPES[kind]};base64,{data}"


def _append_lists(wanted: ChatRequest, read: list[tuple[str, list[Part | _Wanted]]]) -> None:
    """What the lists beside the messages hold goes behind the last message of the user."""
    lists: tuple[tuple[Kind, str, list[str]], ...] = (
        ("image", "images", wanted.images),
        ("audio", "audios", wanted.audios),
        ("video", "videos", wanted.videos),
    )
    extra: list[Part | _Wanted] = [
        (kind, source, f"{name}.{index}")
        for kind, name, sources in lists
        for index, source in enumerate(sources)
    ]
    if not extra:
        return
    user = next((parts for role, parts in reversed(read) if role == "user"), None)
    if user is None:
        raise RequestError(
            "Media without a message of the user.",
            hint="Add a message with the role user.",
            code="missing_message",
            param="messages",
        )
    user += extra
