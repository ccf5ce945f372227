"""The main of a stage's process: `python -m sgl_diffusion.orchestrator.stage_process`.

Its standard input is the socket to the server; it takes no arguments and imports no torch itself.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import socket
import struct
import sys

from sgl_diffusion.base import log
from sgl_diffusion.orchestrator.channel import SocketChannel, socket_from_stdin
from sgl_diffusion.orchestrator.frames import ChannelClosedError
from sgl_diffusion.orchestrator.stage_loop import StageLoop, await_boot

_PR_SET_PDEATHSIG = 1


def main() -> int:
    connection = socket_from_stdin()
    die_with_parent(connection)
    faulthandler.enable()
    channel = SocketChannel(connection)
    try:
        boot, early = await_boot(channel)
    except ChannelClosedError:
        return 1
    log.set_up(boot.log_level)
    return StageLoop(channel, boot, early).run()


def die_with_parent(connection: socket.socket) -> None:
    """No worker outlives its server, not even one that was killed, and none leaves a core."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The signal comes only for a death from now on. The server made the socket pair, so the
    # kernel knows its process id as that of our peer.
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    server, _, _ = struct.unpack("iII", credentials)
    if os.getppid() != server:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
