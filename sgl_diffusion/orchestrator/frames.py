"""Frames on a Unix stream socket: a length, a body, and file descriptors that travel with it.

Both ends use the same two classes, on non-blocking sockets: a `FrameWriter` keeps what the kernel
does not take yet, a `FrameReader` keeps what has not arrived in full. Descriptors belong to the
frame: the writer closes them when they are sent, the reader hands them over open.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

MAX_BODY = 64 << 20
MAX_DESCRIPTORS = 4
_HEADER = struct.Struct("<IB")  # bytes of the body, number of descriptors
_CHUNK = 1 << 18


class ChannelError(Exception):
    """The peer broke the framing; the channel is of no use any more."""


class ChannelClosedError(ChannelError):
    """The peer is gone."""


@dataclass(frozen=True)
class Frame:
    body: bytes
    descriptors: tuple[int, ...] = ()

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


class FrameWriter:
    """Queue frames with `add`, send what the socket takes with `flush`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._waiting: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self.pending = 0

    def add(self, frame: Frame) -> None:
        assert len(frame.body) <= MAX_BODY, f"a frame of {len(frame.body)} bytes"
        assert len(frame.descriptors) <= MAX_DESCRIPTORS
        data = _HEADER.pack(len(frame.body), len(frame.descriptors)) + frame.body
        self._waiting.append((memoryview(data), frame.descriptors))
        self.pending += len(data)

    def flush(self) -> bool:
        """True when nothing waits any more."""
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                sent = socket.send_fds(self._socket, [data], list(descriptors))
            except BlockingIOError:
                return False
            except OSError as error:
                raise ChannelClosedError("the peer is gone") from error
            # Descriptors go with the first byte, so they are sent even if the rest is not.
            for descriptor in descriptors:
                os.close(descriptor)
            self.pending -= sent
            if sent == len(data):
                self._waiting.popleft()
            else:
                self._waiting[0] = (data[sent:], ())
        return True

    def close(self) -> None:
        for _, descriptors in self._waiting:
            for descriptor in descriptors:
                os.close(descriptor)
        self._waiting.clear()
        self.pending = 0


class FrameReader:
    """Collect bytes with `fill`, take whole frames out with `frames`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()

    def fill(self) -> bool:
        """Read once; False if nothing waits."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _CHUNK, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelClosedError("the peer is gone") from error
        for level, kind, packed in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(packed[: len(packed) - len(packed) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            raise ChannelError("a descriptor got lost; this process may have too many open files")
        if not data:
            raise ChannelClosedError("the peer is gone")
        self._buffer += data
        return True

    def frames(self) -> Iterator[Frame]:
        """Take out the frames that are here in full."""
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                length, count = _HEADER.unpack_from(self._buffer, start)
                if length > MAX_BODY or count > MAX_DESCRIPTORS:
                    raise ChannelError(f"a frame of {length} bytes and {count} descriptors")
                end = start + _HEADER.size + length
                if end > len(self._buffer):
                    return
                if count > len(self._descriptors):
                    raise ChannelError("a frame without the descriptors it announces")
                body = bytes(memoryview(self._buffer)[start + _HEADER.size : end])
                start = end
                yield Frame(body, tuple(self._descriptors.popleft() for _ in range(count)))
        finally:
            del self._buffer[:start]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())
