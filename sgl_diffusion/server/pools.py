"""The threads beside the event loop: one pool for what somebody waits for, one for videos.

A video is encoded for seconds. In a pool of its own it keeps no picture waiting, and its threads,
with those that x264 starts from them, give way to a worker that needs the cores.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

_MOST = 8
_GIVE_WAY = 10  # niceness: about a tenth of a core beside threads that want it


def media_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST), thread_name_prefix="media")


def video_pool() -> ThreadPoolExecutor:
    """Few threads: x264 starts its own."""
    count = max(min((os.cpu_count() or 1) // 2, _MOST), 1)
    return ThreadPoolExecutor(count, thread_name_prefix="video", initializer=_give_way)


def _give_way() -> None:
    """Linux has a niceness per thread, and a new thread takes over that of its maker."""
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread) + _GIVE_WAY
    os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))
