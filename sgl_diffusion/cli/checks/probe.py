"""What only a process that loads torch and the native libraries can tell, and that may die of it.

`run` starts it; the process prints the name of each part and then what it found, so that a crash
has a name.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgl_diffusion.base import env
from sgl_diffusion.base.errors import SglError

SECONDS = 180.0
_MAPS = "/proc/self/maps"
_THREAD_LIBRARIES = ("libgomp", "libiomp5", "libomp")

Facts = dict[str, Any]


@dataclass(frozen=True)
class Probed:
    """What the parts found, and why some found nothing."""

    facts: dict[str, Facts] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def run(seconds: float = SECONDS) -> Probed:
    """Look in a process of its own, with the environment that a worker gets."""
    command = [sys.executable, "-m", "sgl_diffusion.cli.checks.probe"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=env.child_environment()
        )
    except subprocess.TimeoutExpired as error:
        told = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return _read(told, f"it did not answer within {seconds:g} s")
    return _read(done.stdout, _end(done.returncode))


def _read(text: str, end: str) -> Probed:
    found, begun = Probed(), ""
    for line in text.splitlines():
        part, _, told = line.partition(" ")
        if part == "begin":
            begun = told
        elif part == "found" and begun:
            found.facts[begun], begun = json.loads(told), ""
        elif part == "broken" and begun:
            found.broken[begun], begun = json.loads(told), ""
    if begun:
        found.broken[begun] = end
    return found


def _end(status: int) -> str:
    if status >= 0:
        return f"it ended with status {status}"
    return f"it was killed by {signal.Signals(-status).name}"


def torch_facts() -> Facts:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": list(torch.cuda.get_device_capability(index)),
                "free": free,
                "total": total,
            }
        )
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


def native_facts() -> Facts:
    import torch

    from sgl_diffusion.ops import library

    absent, path = library.absent(), library.path()
    if absent:
        return {"absent": absent, "exists": path.exists()}
    return {
        "absent": "",
        "path": str(path),
        "isa": str(torch.ops.sgld.cpu_isa()),
        "cuda": bool(torch.ops.sgld.has_cuda()),
    }


def triton_facts() -> Facts:
    if importlib.util.find_spec("triton") is None:
        return {"version": None}
    import triton

    return {"version": triton.__version__}


def codec_facts() -> Facts:
    """Encoders that PyAV lacks: of videos, and of the sound that omni models make."""
    import av

    from sgl_diffusion.server.omni.sound import FORMATS, can_make

    try:
        av.codec.Codec("libx264", "w")
        video = True
    except ValueError:
        video = False
    silent = [name for name in FORMATS if not can_make(name)]
    return {"version": av.__version__, "video": video, "silent": silent}


def memory_facts() -> Facts:
    import torch

    from sgl_diffusion.base.memory import free_memory

    return {"free": free_memory(torch.device("cpu"))}


def thread_facts() -> Facts:
    """The thread libraries that everything above has loaded; each has threads of its own."""
    with open(_MAPS) as maps:
        rows = [line.strip().split(maxsplit=5) for line in maps]
    files = {row[5] for row in rows if len(row) == 6}
    loaded = [file for file in files if Path(file).name.startswith(_THREAD_LIBRARIES)]
    return {"files": sorted(loaded)}


PARTS: dict[str, Callable[[], Facts]] = {
    "torch": torch_facts,
    "native": native_facts,
    "triton": triton_facts,
    "codecs": codec_facts,
    "memory": memory_facts,
    "threads": thread_facts,
}


def _main() -> None:
    for name, look in PARTS.items():
        print("begin", name, flush=True)
        try:
            print("found", json.dumps(look()), flush=True)
        except SglError as error:
            print("broken", json.dumps(str(error)), flush=True)
        except Exception as error:  # whatever a broken package raises is what the doctor is for
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print("broken", json.dumps(reason[:300]), flush=True)


if __name__ == "__main__":
    _main()
