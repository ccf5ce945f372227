"""A chat as server-sent events: the role, text and sound as they are made, the end with usage."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from sgl_diffusion.client.chat import ChatHandle, SoundPiece, TextPiece
from sgl_diffusion.server.omni.chat_answer import ChatReply, logprobs_of
from sgl_diffusion.server.omni.sound import pcm16
from sgl_diffusion.server.sse import PING, with_pings

DONE = b"data: [DONE]\n\n"


async def events(
    reply: ChatReply,
    handle: ChatHandle,
    pieces: AsyncIterator[TextPiece | SoundPiece],
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """Usage comes with the last chunk of the last choice; with `include_usage` also in a chunk of
    its own, as OpenAI sends it."""
    talk = _Talk(reply)
    for index in range(reply.wanted.n):
        yield _data(reply.chunk([_delta(index, {"role": "assistant", "content": ""})]))
    held: dict[str, Any] | None = None
    async for piece in with_pings(pieces):
        if piece is None:
            yield PING
            continue
        for delta in talk.deltas(piece):
            yield _data(reply.chunk([delta]))
        if talk.ended(piece):
            if held is not None:
                yield _data(reply.chunk([held]))
            held = _delta(piece.index, {}, talk.reason(piece.index))
    usage = (await handle.result()).usage
    if held is not None:
        yield _data(reply.chunk([held], usage))
    if include_usage:
        yield _data(reply.chunk([], usage))
    yield DONE


class _Talk:
    """What is said of each choice, and whether it has ended."""

    def __init__(self, reply: ChatReply) -> None:
        self._reply = reply
        self._parts = 1 if reply.speech is None else 2
        self._ends: dict[int, list[str]] = {index: [] for index in range(reply.wanted.n)}

    def deltas(self, piece: TextPiece | SoundPiece) -> list[dict[str, Any]]:
        if piece.finish_reason is not None:
            self._ends[piece.index].append(piece.finish_reason)
        if isinstance(piece, SoundPiece):
            return self._sound(piece)
        scores = logprobs_of(piece.logprobs)
        if not piece.text and not scores:
            return []
        if self._reply.shows_text:
            return [_delta(piece.index, {"content": piece.text}) | {"logprobs": scores}]
        return [self._audio(piece.index, {"transcript": piece.text}) | {"logprobs": scores}]

    def ended(self, piece: TextPiece | SoundPiece) -> bool:
        return piece.finish_reason is not None and len(self._ends[piece.index]) == self._parts

    def reason(self, index: int) -> str:
        """Text or sound that was cut makes the answer one that was cut."""
        return "length" if "length" in self._ends[index] else "stop"

    def _sound(self, piece: SoundPiece) -> list[dict[str, Any]]:
        found = []
        if len(piece.samples):
            data = base64.b64encode(pcm16(piece.samples)).decode()
            found.append(self._audio(piece.index, {"data": data}))
        if piece.finish_reason is not None:
            found.append(self._audio(piece.index, {"expires_at": self._reply.expires_at}))
        return found

    def _audio(self, index: int, fields: dict[str, Any]) -> dict[str, Any]:
        return _delta(index, {"audio": {"id": self._reply.audio_id(index), **fields}})


def _delta(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _data(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()
