"""What the first rank tells the others before each unit of work: msgpack, over the CPU group."""

from __future__ import annotations

from typing import Literal

import msgspec

from sgl_diffusion.orchestrator.messages import Cancel, Control, Submit


class Turn(msgspec.Struct, frozen=True):
    """First `messages`, in order; then the jobs of every rank are `jobs`; then the unit.

    `rows` are those of a denoise step, as job and place in it; `job` is the one to encode or to
    decode. Without tiles decoding is for the first rank alone, and is no unit of the others.
    """

    messages: list[Submit | Cancel | Control] = []
    jobs: list[str] = []
    unit: Literal["", "encode", "denoise", "decode"] = ""
    job: str = ""
    rows: list[tuple[str, int]] = []


_encoder = msgspec.msgpack.Encoder()
_turns = msgspec.msgpack.Decoder(Turn)


def encode_turn(turn: Turn) -> bytes:
    return _encoder.encode(turn)


def decode_turn(data: bytes) -> Turn:
    return _turns.decode(data)
