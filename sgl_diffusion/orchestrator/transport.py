"""The coordinator's end of a stage: in a process of its own, or in a thread of this one.

Both are driven by the event loop they are opened in and report to a `Listener` from that loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from numpy.typing import NDArray

from sgl_diffusion.base import env
from sgl_diffusion.orchestrator import messages, relay
from sgl_diffusion.orchestrator.channel import Arrays, QueueChannel
from sgl_diffusion.orchestrator.frames import (
    ChannelClosedError,
    ChannelError,
    Frame,
    FrameReader,
    FrameWriter,
)
from sgl_diffusion.orchestrator.messages import Boot, Feed, FromStage, Output, ToStage
from sgl_diffusion.orchestrator.stage_loop import StageLoop, await_boot

# How long a stage that closed its end may take to exit before it counts as stuck.
_EXIT_GRACE = 2.0


class Listener(Protocol):
    def received(self, message: FromStage, arrays: list[NDArray[Any]]) -> None: ...

    def broken(self, why: str) -> None:
        """Nothing more will be received, though the stage still runs."""

    def exited(self, reason: str, why: str) -> None:
        """The stage is gone: the last call. `reason` is one word for the metrics."""


class Link(Protocol):
    """One running stage."""

    name: str
    killable: bool
    pid: int | None  # where it is a process of its own

    def send(self, message: ToStage, arrays: Arrays = ()) -> None:
        """Send without waiting; a message to a stage that is gone is dropped. Only a `Feed` has
        arrays."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Transport(Protocol):
    def open(self, boot: Boot, listener: Listener) -> Link: ...


class ProcessTransport:
    """Stages as child processes, each with a session of its own."""

    def open(self, boot: Boot, listener: Listener) -> Link:
        return _ProcessLink(boot, listener)


class ThreadTransport:
    """Stages as threads: a hung one cannot be killed, only left behind."""

    def open(self, boot: Boot, listener: Listener) -> Link:
        return _ThreadLink(boot, listener)


class _ProcessLink:
    killable = True

    def __init__(self, boot: Boot, listener: Listener) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._reader = FrameReader(self._socket)
        self._writer = FrameWriter(self._socket)
        # Started by the loop's own thread: the child asks to die with the thread that made it.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sgl_diffusion.orchestrator.stage_process"],
                stdin=theirs.fileno(),
                stdout=2,
                start_new_session=True,
                env=env.child_environment({"PYTHONPATH": _python_path()}),
            )
        self.pid: int | None = self._process.pid
        self.name = f"worker {self.pid}"
        self._kernel_kills = _kernel_kills()
        self._reading = True
        self._loop.add_reader(self._socket, self._readable)
        threading.Thread(target=self._wait, name=f"wait-{self.name}", daemon=True).start()
        self.send(boot)

    def send(self, message: ToStage, arrays: Arrays = ()) -> None:
        if self._socket.fileno() < 0:
            return
        memory = None
        if isinstance(message, Feed) and not message.data:
            memory = relay.pack(arrays, message.arrays)
        self._writer.add(Frame(messages.encode(message), () if memory is None else (memory,)))
        self._flush()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # Also between its exit and our reaping: the id cannot be another group's before that.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _flush(self) -> None:
        try:
            done = self._writer.flush()
        except ChannelClosedError:
            # The exit of the process is reported by `_wait`.
            self._writer.close()
            done = True
        if done:
            self._loop.remove_writer(self._socket)
        else:
            self._loop.add_writer(self._socket, self._flush)

    def _readable(self) -> None:
        try:
            self._reader.fill()
            self._take()
        except ChannelClosedError:
            self._stop_reading()
            self._loop.call_later(_EXIT_GRACE, self._broken, "closed its channel")
        except ChannelError as error:
            self._stop_reading()
            self._broken(f"broke the protocol: {error}")

    def _take(self) -> None:
        for frame in self._reader.frames():
            message, arrays = _decode(frame)
            self._listener.received(message, arrays)

    def _stop_reading(self) -> None:
        self._reading = False
        self._loop.remove_reader(self._socket)

    def _broken(self, why: str) -> None:
        if self._process.returncode is None:
            self._listener.broken(why)

    def _wait(self) -> None:
        """Thread: wait for the exit, but leave the reaping to the loop."""
        with contextlib.suppress(ChildProcessError):  # reaped for us: SIGCHLD is ignored
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        try:
            self._loop.call_soon_threadsafe(self._exited)
        except RuntimeError:
            # The loop was closed without a stop; whoever did that expects no more reports.
            self._process.wait()
            self._close()

    def _exited(self) -> None:
        self._signal(signal.SIGKILL)
        try:
            while self._reading and self._reader.fill():
                self._take()
        except ChannelError:
            pass
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        code = self._process.wait()
        self._close()
        self._listener.exited(*_death(code, _kernel_kills() > self._kernel_kills))

    def _close(self) -> None:
        self._reader.close()
        self._writer.close()
        self._socket.close()


class _ThreadLink:
    killable = False
    pid: int | None = None

    def __init__(self, boot: Boot, listener: Listener) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._over = False
        self._channel = QueueChannel(self._deliver)
        self.name = f"worker thread of stage {boot.stage}"
        threading.Thread(target=self._run, name=f"stage-{boot.stage}", daemon=True).start()
        self.send(boot)

    def send(self, message: ToStage, arrays: Arrays = ()) -> None:
        self._channel.put(messages.encode(message), arrays)

    def terminate(self) -> None:
        self._channel.close()

    def kill(self) -> None:
        self.terminate()
        self._exited("abandoned", "did not end and was left behind")

    def _run(self) -> None:
        code = 1
        try:
            code = StageLoop(self._channel, *await_boot(self._channel)).run()
        except ChannelClosedError:
            pass
        finally:
            self._call(self._exited, "exit", f"ended with status {code}")

    def _deliver(self, body: bytes, arrays: list[NDArray[Any]]) -> None:
        self._call(self._received, messages.decode_from_stage(body), arrays)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            self._channel.close()  # the loop was closed without a stop

    def _received(self, message: FromStage, arrays: list[NDArray[Any]]) -> None:
        if not self._over:
            self._listener.received(message, arrays)

    def _exited(self, reason: str, why: str) -> None:
        if not self._over:
            self._over = True
            self._listener.exited(reason, why)


def _decode(frame: Frame) -> tuple[FromStage, list[NDArray[Any]]]:
    try:
        message = messages.decode_from_stage(frame.body)
    except msgspec.MsgspecError as error:
        frame.close()
        raise ChannelError(str(error)) from error
    if isinstance(message, Output) and len(frame.descriptors) <= 1:
        return message, relay.unpack(message.arrays, *(frame.descriptors or (None,)))
    if frame.descriptors:
        frame.close()
        raise ChannelError(f"a {type(message).__name__} with descriptors")
    return message, []


def _kernel_kills() -> int:
    """How many processes of this machine the kernel has killed for want of memory."""
    try:
        fields = Path("/proc/vmstat").read_text().split()
    except OSError:
        return 0
    return int(fields[fields.index("oom_kill") + 1]) if "oom_kill" in fields else 0


def _death(code: int, kernel_killed: bool) -> tuple[str, str]:
    if code == -signal.SIGKILL and kernel_killed:
        # Whose process the kernel killed is not told, only that it killed one.
        return "memory", "was killed by signal 9, probably because memory ran out"
    if code >= 0:
        return "exit", f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return "signal", f"was killed by signal {-code} ({name})"


def _python_path() -> str:
    """Where this process finds modules beyond its interpreter's own folders, for the child."""
    own = set(sysconfig.get_paths().values())
    library = sysconfig.get_path("stdlib") + os.sep
    paths = [os.path.abspath(path) for path in sys.path]
    extra = [p for p in paths if p not in own and not p.startswith(library) and os.path.isdir(p)]
    return os.pathsep.join(dict.fromkeys(extra))
