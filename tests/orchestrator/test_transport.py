"""Frames, shared memory and credits: what the two ends of a channel promise each other."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from sgl_diffusion.orchestrator import messages, relay
from sgl_diffusion.orchestrator.channel import SocketChannel
from sgl_diffusion.orchestrator.frames import (
    MAX_BODY,
    ChannelClosedError,
    ChannelError,
    Frame,
    FrameReader,
    FrameWriter,
)
from sgl_diffusion.orchestrator.messages import ArraySpec, Boot, Credit, Output, Submit
from sgl_diffusion.orchestrator.stage_loop import StageLoop
from tests.orchestrator.play import descriptors

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = descriptors()
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    yield ends
    for end in ends:
        end.close()
    assert not descriptors() - before


def memory(content: bytes) -> int:
    descriptor = os.memfd_create("test")
    os.write(descriptor, content)
    return descriptor


def test_frames_survive_small_buffers_and_keep_their_descriptors(pair: Pair) -> None:
    sizes = [0, 1, 70_000, 3, 300_000, 0, 5]
    writer, reader = FrameWriter(pair[0]), FrameReader(pair[1])
    for number, size in enumerate(sizes):
        held = (memory(b"%d" % number),) if number % 2 else ()
        writer.add(Frame(bytes([number]) * size, held))
    assert not writer.flush()
    got: list[tuple[bytes, bytes | None]] = []
    while len(got) < len(sizes):
        writer.flush()
        while reader.fill():
            for frame in reader.frames():
                texts = [os.pread(fd, 10, 0) for fd in frame.descriptors]
                assert all(not os.get_inheritable(fd) for fd in frame.descriptors)
                frame.close()
                got.append((frame.body, *(texts or [None])))
    assert writer.flush() and writer.pending == 0
    for number, (size, (body, text)) in enumerate(zip(sizes, got, strict=True)):
        assert body == bytes([number]) * size
        assert text == (b"%d" % number if number % 2 else None)


def test_frames_that_never_arrive_are_closed(pair: Pair) -> None:
    writer, reader = FrameWriter(pair[0]), FrameReader(pair[1])
    for _ in range(3):
        writer.add(Frame(b"x" * 100_000, (memory(b""),)))
    writer.flush()
    reader.fill()  # a first part, with the first descriptor
    assert list(reader.frames()) == []
    writer.close()
    reader.close()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<IB", MAX_BODY + 1, 0),
        struct.pack("<IB", 4, 200),
        struct.pack("<IB", 4, 1) + b"abcd",
    ],
    ids=["too long", "too many descriptors", "descriptor missing"],
)
def test_malformed_frames_are_an_error(pair: Pair, data: bytes) -> None:
    pair[0].send(data)
    reader = FrameReader(pair[1])
    with pytest.raises(ChannelError):
        reader.fill()
        list(reader.frames())


def test_a_closed_peer_is_noticed_by_both_sides(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(ChannelClosedError):
        FrameReader(pair[1]).fill()
    writer = FrameWriter(pair[1])
    writer.add(Frame(b"x", (memory(b""),)))
    with pytest.raises(ChannelClosedError):
        writer.flush()
    writer.close()


def test_shared_memory_is_exact_sealed_and_gone_with_the_last_array() -> None:
    before = descriptors()
    whole = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    sent: list[Any] = [whole.transpose(1, 2, 3, 0), whole[:, ::2], whole[:0], np.float64(2.5)]
    sent = [np.asarray(values) for values in sent]
    specs = relay.describe(sent)
    descriptor = relay.pack(sent, specs)
    assert descriptor is not None
    with pytest.raises(PermissionError):
        os.truncate(descriptor, 0)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    got = relay.unpack(specs, descriptor)
    for ours, theirs in zip(sent, got, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)
        with pytest.raises(ValueError, match="read-only"):
            theirs[...] = 0
    last = got[1]
    del got, theirs
    np.testing.assert_array_equal(last, whole[:, ::2])
    del last
    assert not descriptors() - before


def test_torch_tensors_travel_without_their_library() -> None:
    torch = pytest.importorskip("torch")
    values = np.asarray(torch.arange(6, dtype=torch.uint8).reshape(2, 3))
    specs = relay.describe([values])
    (got,) = relay.unpack(specs, relay.pack([values], specs))
    assert got.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "spec",
    [
        ArraySpec("|u1", (65,), 0),
        ArraySpec("|u1", (8,), 60),
        ArraySpec("|u1", (-1,), 0),
        ArraySpec("|u1", (1,), -8),
        ArraySpec("|O", (1,), 0),
        ArraySpec("nonsense", (1,), 0),
        ArraySpec("<f8", (1 << 62, 4), 0),
    ],
)
def test_arrays_that_do_not_fit_their_memory_are_refused(spec: ArraySpec) -> None:
    before = descriptors()
    content = [np.zeros(64, np.uint8)]
    descriptor = relay.pack(content, relay.describe(content))
    with pytest.raises(ChannelError):
        relay.unpack([spec], descriptor)
    assert not descriptors() - before


def test_unsealed_memory_is_refused() -> None:
    before = descriptors()
    descriptor = memory(bytes(64))
    fcntl.fcntl(descriptor, fcntl.F_GETFD)
    with pytest.raises(ChannelError, match="not sealed"):
        relay.unpack([ArraySpec("|u1", (64,), 0)], descriptor)
    assert not descriptors() - before


def test_messages_are_checked_when_they_arrive() -> None:
    with pytest.raises(msgspec.ValidationError):
        messages.decode_from_stage(messages.encode(Submit("a", {})))
    with pytest.raises(msgspec.MsgspecError):
        messages.decode_to_stage(b"\xc1")


def test_credits_bound_what_is_on_its_way_and_do_not_stop_the_steps(pair: Pair) -> None:
    """The coordinator's side is played by hand here, so that it can refuse to give credit."""
    ours, theirs = pair
    writer, reader = FrameWriter(ours), FrameReader(ours)

    def send(*sent: Any) -> None:
        for message in sent:
            writer.add(Frame(messages.encode(message)))
        assert writer.flush()

    got: list[Any] = []

    def outputs() -> list[str]:
        return [m.job_id for m in got if isinstance(m, Output)]

    def receive_until(enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not enough():
            assert time.monotonic() < deadline, got[-5:]
            while reader.fill():
                for frame in reader.frames():
                    got.append(messages.decode_from_stage(frame.body))
                    frame.close()
            time.sleep(0.005)

    boot = Boot("s", "tests.orchestrator.small_worker:make_worker", {}, "info", 0.1, 3)
    stage = StageLoop(SocketChannel(theirs), boot)
    thread = threading.Thread(target=stage.run)
    thread.start()
    jobs = [f"job{n}" for n in range(10)]
    for job_id in jobs:
        send(Submit(job_id, {"steps": 3, "arrays": [["uint8", [1 << 20], 1]]}))
    send(Submit("long", {"steps": 100, "sleep": 0.002}))
    # The long one is computed to its end meanwhile, and its output waits behind the others.
    last = messages.Progress("long", 100, 100, "work")
    receive_until(lambda: last in got)
    assert outputs() == jobs[:3]
    send(Credit(2))
    receive_until(lambda: len(outputs()) == 5)
    # A cancelled job's output is dropped where it waits.
    send(messages.Cancel(jobs[5]), Credit(20))
    receive_until(lambda: "long" in outputs())
    assert outputs() == [*jobs[:5], *jobs[6:], "long"]
    send(messages.Shutdown(0.0))
    thread.join(10)
    assert not thread.is_alive()
    reader.close()
