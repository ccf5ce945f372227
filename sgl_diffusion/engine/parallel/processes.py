"""The processes of the other ranks, which the first one starts, watches and takes along.

They are in its process group, so whoever ends the worker ends them all, and they ask the kernel to
die with it.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from sgl_diffusion.base import env
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator import messages
from sgl_diffusion.orchestrator.frames import Frame, FrameWriter
from sgl_diffusion.orchestrator.messages import Boot

log = get_logger(__name__)

MODULE = "sgl_diffusion.engine.parallel.rank_process"


def start_ranks(boots: Sequence[Boot]) -> None:
    """One process for each; the first that ends takes this process along."""
    processes: list[subprocess.Popen[bytes]] = []
    lines: list[socket.socket] = []  # open as long as the ranks may read
    leaving = threading.Event()
    for rank, boot in enumerate(boots, 1):
        ours, theirs = socket.socketpair()
        lines.append(ours)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE],
                stdin=theirs.fileno(),
                stdout=2,
                env=env.child_environment(),
            )
        writer = FrameWriter(ours)
        writer.add(Frame(messages.encode(boot)))
        writer.flush()
        processes.append(process)
        threading.Thread(
            target=_watch, args=(rank, process, leaving), name=f"watch-rank-{rank}", daemon=True
        ).start()
    atexit.register(_end, processes, lines, leaving)


def _end(
    processes: list[subprocess.Popen[bytes]], lines: list[socket.socket], leaving: threading.Event
) -> None:
    leaving.set()
    for process in processes:
        process.kill()
    for process, line in zip(processes, lines, strict=True):
        process.wait()
        line.close()


def _watch(rank: int, process: subprocess.Popen[bytes], leaving: threading.Event) -> None:
    status = process.wait()
    if leaving.is_set():
        return
    log.error("rank %d ended with status %d; all ranks end", rank, status)
    # The main thread may wait in an exchange for the rank that is gone.
    os._exit(1)
