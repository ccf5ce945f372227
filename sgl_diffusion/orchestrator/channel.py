"""The stage's end of its connection to the coordinator, used by one thread.

`SocketChannel` is for a stage in a process of its own, `QueueChannel` for one in a thread. Messages
are encoded in both, so that nothing slips through in one that cannot cross the other.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from numpy.typing import NDArray

from sgl_diffusion.orchestrator import messages, relay
from sgl_diffusion.orchestrator.frames import (
    MAX_BODY,
    ChannelClosedError,
    ChannelError,
    Frame,
    FrameReader,
    FrameWriter,
)
from sgl_diffusion.orchestrator.messages import Feed, FromStage, Output, Payload, ToStage

Arrays = Sequence[NDArray[Any]]

# With this much unsent the coordinator is busy: news that the next news replaces are left out.
_BACKLOG = 1 << 20


@dataclass(frozen=True, eq=False)
class Fed:
    """A `Feed` with its arrays."""

    job_id: str
    meta: Payload
    arrays: list[NDArray[Any]]


Received = ToStage | Fed


class Channel(Protocol):
    def receive(self, timeout: float) -> list[Received]:
        """Wait for messages, at most `timeout` seconds; may return early and empty."""

    def send(self, message: FromStage, arrays: Arrays = (), *, advisory: bool = False) -> None:
        """Queue a message without waiting; an advisory one may be left out."""

    def finish(self, seconds: float) -> None:
        """Wait until everything is sent, then close."""


class SocketChannel:
    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._reader = FrameReader(connection)
        self._writer = FrameWriter(connection)
        self._poll = select.poll()

    def receive(self, timeout: float) -> list[Received]:
        self._wait(select.POLLIN, timeout)
        received: list[Received] = []
        while self._reader.fill():
            received += map(_received, self._reader.frames())
        return received

    def send(self, message: FromStage, arrays: Arrays = (), *, advisory: bool = False) -> None:
        if advisory and self._writer.pending > _BACKLOG:
            return
        body = messages.encode(message)
        assert len(body) <= MAX_BODY, f"a {type(message).__name__} of {len(body)} bytes"
        memory = relay.pack(arrays, message.arrays) if isinstance(message, Output) else None
        self._writer.add(Frame(body, () if memory is None else (memory,)))
        self._writer.flush()

    def finish(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        try:
            while self._writer.pending and time.monotonic() < deadline:
                self._wait(0, deadline - time.monotonic())
        except ChannelClosedError:
            pass
        finally:
            self._writer.close()
            self._reader.close()
            self._socket.close()

    def _wait(self, events: int, timeout: float) -> None:
        if self._writer.pending:
            events |= select.POLLOUT
        self._poll.register(self._socket, events)
        for _, ready in self._poll.poll(max(timeout, 0.0) * 1000):
            if ready & select.POLLOUT:
                self._writer.flush()
            elif ready & select.POLLHUP and not events & select.POLLIN:
                raise ChannelClosedError("the peer is gone")


class QueueChannel:
    """`deliver` takes encoded messages and arrays to the coordinator's thread."""

    def __init__(self, deliver: Callable[[bytes, list[NDArray[Any]]], None]) -> None:
        self._deliver = deliver
        self._incoming: queue.SimpleQueue[tuple[bytes, list[NDArray[Any]]] | None]
        self._incoming = queue.SimpleQueue()

    def put(self, body: bytes, arrays: Arrays = ()) -> None:
        """Called by the coordinator."""
        self._incoming.put((body, list(arrays)))

    def close(self) -> None:
        """Called by the coordinator: nothing more comes."""
        self._incoming.put(None)

    def receive(self, timeout: float) -> list[Received]:
        received: list[Received] = []
        try:
            while True:
                wait = timeout if timeout > 0 and not received else None
                item = self._incoming.get(block=wait is not None, timeout=wait)
                if item is None:
                    self._incoming.put(None)
                    raise ChannelClosedError("the coordinator is gone")
                message = messages.decode_to_stage(item[0])
                received.append(_fed(message, item[1]) if isinstance(message, Feed) else message)
        except queue.Empty:
            return received

    def send(self, message: FromStage, arrays: Arrays = (), *, advisory: bool = False) -> None:
        views = [values.view() for values in arrays]
        for view in views:
            view.flags.writeable = False
        self._deliver(messages.encode(message), views)

    def finish(self, seconds: float) -> None:
        """Nothing waits here: a message is delivered at once."""


def _received(frame: Frame) -> Received:
    try:
        message = messages.decode_to_stage(frame.body)
    except msgspec.MsgspecError:
        frame.close()
        raise
    if isinstance(message, Feed) and len(frame.descriptors) <= 1:
        descriptor = frame.descriptors[0] if frame.descriptors else None
        return _fed(message, relay.unpack(message.arrays, descriptor, message.data))
    if frame.descriptors:
        frame.close()
        raise ChannelError(f"a {type(message).__name__} with descriptors")
    return message


def _fed(message: Feed, arrays: list[NDArray[Any]]) -> Fed:
    return Fed(message.job_id, message.meta, arrays)


def socket_from_stdin() -> socket.socket:
    """The socket that this process got as its standard input, which becomes /dev/null.

    A program that the worker starts would inherit descriptor 0, and hold or read the channel.
    """
    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return connection
