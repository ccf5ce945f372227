"""The main of every rank but the first: `python -m sgl_diffusion.engine.parallel.rank_process`.

Its standard input is a socket with its `Boot`, whose entry is called and runs until the end.
"""

from __future__ import annotations

import faulthandler
import importlib
import sys

from sgl_diffusion.base import log
from sgl_diffusion.orchestrator.channel import SocketChannel, socket_from_stdin
from sgl_diffusion.orchestrator.stage_loop import await_boot
from sgl_diffusion.orchestrator.stage_process import die_with_parent


def main() -> int:
    connection = socket_from_stdin()
    die_with_parent(connection)
    faulthandler.enable()
    boot, _ = await_boot(SocketChannel(connection))
    log.set_up(boot.log_level)
    module, _, name = boot.entry.partition(":")
    getattr(importlib.import_module(module), name)(boot.config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
