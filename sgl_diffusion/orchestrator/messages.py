"""The messages between the coordinator and a stage: typed, msgpack on the wire, never pickle.

The orchestrator does not look into `payload`, `meta` and `card`: they belong to the app. Arrays
travel beside an `Output` or a `Feed` (one memfd per message), described by its `arrays`; few bytes
travel inside a `Feed`, as its `data`.
"""

from __future__ import annotations

from typing import Any

import msgspec

Payload = dict[str, Any]


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag."""


# -- coordinator to stage -------------------------------------------------------------------------


class Boot(Message, frozen=True):
    """First message: which worker to build ("module:function") and with what.

    `heartbeat` is the longest silence of an idle stage in seconds, `credits` the most outputs with
    arrays that may be on their way at a time.
    """

    stage: str
    entry: str
    config: Payload
    log_level: str = "info"
    heartbeat: float = 1.0
    credits: int = 8


class Submit(Message, frozen=True):
    job_id: str
    payload: Payload
    attempt: int = 1


class ArraySpec(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Feed(Message, frozen=True):
    """What another stage made of a job for this one; the first opens the job here."""

    job_id: str
    meta: Payload
    arrays: list[ArraySpec]
    data: bytes = b""


class Cancel(Message, frozen=True):
    """Answered with `Dropped`."""

    job_id: str


class Control(Message, frozen=True):
    """A barrier: runs between steps, on every rank or on none."""

    control_id: str
    action: str
    payload: Payload


class Credit(Message, frozen=True):
    """The receiver has taken over `count` outputs: as many more may be sent."""

    count: int


class Shutdown(Message, frozen=True):
    """Finish what runs within `drain_seconds`, then leave."""

    drain_seconds: float


# -- stage to coordinator -------------------------------------------------------------------------


class Metric(msgspec.Struct, frozen=True):
    """One sample of a counter or gauge of the stage, as it stands now."""

    name: str
    value: float
    labels: dict[str, str] = {}
    kind: str = "counter"


class Loading(Message, frozen=True):
    note: str


class Ready(Message, frozen=True):
    """`spent` says what the seconds were spent on: imports, weights and so on."""

    card: Payload
    load_seconds: float
    spent: dict[str, float] = {}


class Heartbeat(Message, frozen=True):
    metrics: list[Metric]
    running: int


class Progress(Message, frozen=True):
    """`step` of `total` is about the whole job; `phase` is a word for people: encode, denoise."""

    job_id: str
    step: int
    total: int
    phase: str


class Output(Message, frozen=True):
    """A result, or with `final` false a part of one, or for the stage `to`. With `final` the stage
    that sends it has done its part of the job, as far as the `taken` messages about it go."""

    job_id: str
    meta: Payload
    arrays: list[ArraySpec]
    final: bool = True
    to: str = ""
    taken: int = 0


class Failed(Message, frozen=True):
    """`error` is `errors.to_wire`. A job without an id failed means the stage could not start."""

    error: Payload
    job_id: str | None = None


class Dropped(Message, frozen=True):
    """The worker has let go of a job that was cancelled."""

    job_id: str


class ControlDone(Message, frozen=True):
    control_id: str
    payload: Payload
    error: Payload | None = None


ToStage = Boot | Submit | Feed | Cancel | Control | Credit | Shutdown
FromStage = Loading | Ready | Heartbeat | Progress | Output | Failed | Dropped | ControlDone

_encoder = msgspec.msgpack.Encoder()
_to_stage: msgspec.msgpack.Decoder[ToStage] = msgspec.msgpack.Decoder(ToStage)
_from_stage: msgspec.msgpack.Decoder[FromStage] = msgspec.msgpack.Decoder(FromStage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode_to_stage(data: bytes) -> ToStage:
    return _to_stage.decode(data)


def decode_from_stage(data: bytes) -> FromStage:
    return _from_stage.decode(data)
