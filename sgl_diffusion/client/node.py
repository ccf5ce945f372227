"""A machine that follows another one: its ranks are kept alive until a signal comes.

It answers no requests. Its ranks end with those of machine 0 and are started again, and then wait
for machine 0 to be there.
"""

from __future__ import annotations

import asyncio
import signal

from sgl_diffusion.apps.diffusion import diffusion_app
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.limits import Limits

# A follower is silent while machine 0 loads or decodes; if that dies, it notices by itself.
_LIMITS = Limits(silence=float("inf"), load_silence=float("inf"), leave=3.0, term=0.1)


def follow(options: EngineOptions) -> int:
    """Returns the exit code, after SIGTERM or SIGINT."""
    coordinator = Coordinator(diffusion_app(options), limits=_LIMITS, log_level=options.log_level)
    print(
        f"machine {options.node_rank} of {options.nnodes}, follows {options.dist_init_addr}",
        flush=True,
    )
    asyncio.run(_follow(coordinator))
    return 0


async def _follow(coordinator: Coordinator) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await coordinator.start()
    await ended.wait()
    await coordinator.stop()
