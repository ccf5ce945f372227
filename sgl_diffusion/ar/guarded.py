"""Decoding sound and films of strangers in a process of its own, with little to break.

`python -m sgl_diffusion.ar.guarded` reads {"kind", "source", "target"} as one line of JSON, writes
what the models need as a `.npy` file, and answers {"seconds"} or {"error"}, one of ours, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

CPU_SECONDS = 60
_ADDRESS_BYTES = 6 << 30
_FILE_BYTES = 1 << 30


def _limit() -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, _ADDRESS_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _decode(kind: str, source: Path, target: Path) -> float:
    """Returns how long it is, in seconds."""
    import numpy as np

    from sgl_diffusion.ar.media import FRAMES_PER_SECOND, HEARING_RATE, read_film, read_sound

    if kind == "audio":
        sound = read_sound(source)
        np.save(target, sound, allow_pickle=False)
        return len(sound) / HEARING_RATE
    frames, _ = read_film(source)
    film = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    np.save(target, film, allow_pickle=False)
    return len(film) / FRAMES_PER_SECOND


def main() -> int:
    from sgl_diffusion.base.errors import SglError, to_wire

    _limit()
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    answer: dict[str, Any] = {}
    try:
        answer["seconds"] = _decode(asked["kind"], Path(asked["source"]), Path(asked["target"]))
    except SglError as error:
        answer["error"] = to_wire(error)
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
