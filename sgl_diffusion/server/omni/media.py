"""The media of one request: read through the guards, put down as files for the worker.

Pictures are decoded here, as everywhere in the server. Sound and films are decoded in a process of
their own (`ar/guarded.py`), so that a file that breaks a decoder breaks nothing else.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from sgl_diffusion.base.chat import Kind, Part
from sgl_diffusion.base.env import child_environment
from sgl_diffusion.base.errors import RequestError, from_wire
from sgl_diffusion.server.omni.context import OmniContext

AUDIO_TYPES = frozenset(
    f"audio/{name}"
    for name in (
        *("wav", "x-wav", "wave", "mpeg", "mp3", "flac", "x-flac", "ogg", "opus"),
        *("aac", "mp4", "m4a", "x-m4a", "webm"),
    )
)
VIDEO_TYPES = frozenset(
    f"video/{name}" for name in ("mp4", "webm", "quicktime", "x-matroska", "x-m4v")
)
_TYPES = {"audio": AUDIO_TYPES, "video": VIDEO_TYPES}
_DECODE_SECONDS = 90.0


class RequestMedia:
    """As a context manager it takes the files away at the end. `seconds` is how long all sound and
    films of the request are."""

    def __init__(self, context: OmniContext) -> None:
        self._context = context
        self._folder: Path | None = None
        self._count = 0
        self.seconds = 0.0

    async def __aenter__(self) -> RequestMedia:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def put(self, kind: Kind, source: Any, param: str) -> Part:
        """The file behind `source` (an upload, a URL, a data URL, an allowed path) as a part of a
        message."""
        most = self._context.settings.inputs.image_count
        self._count += 1
        if self._count > most:
            raise RequestError(
                f"A request takes at most {most} media.", code="too_many_media", param=param
            )
        if self._folder is None:
            parent = self._context.settings.data_dir
            self._folder = Path(tempfile.mkdtemp(dir=parent))
        if kind == "image":
            picture = await self._context.inputs.picture(source, param=param)
            path = self._folder / f"{self._count}.png"
            await self._context.in_thread(
                partial(picture.save, path, format="PNG", compress_level=1)
            )
            return Part(kind=kind, path=str(path))
        limits, options = self._context.settings.limits, self._context.options
        size = options.max_audio_mb if kind == "audio" else limits.max_video_mb
        data = await self._context.inputs.read(
            source, param=param, types=_TYPES[kind], max_bytes=size * 2**20
        )
        path = self._folder / f"{self._count}.in"
        await self._context.in_thread(partial(path.write_bytes, data))
        decoded = path.with_suffix(".npy")
        try:
            async with self._context.decoding:
                self.seconds += await _decode(kind, path, decoded, param)
        finally:
            path.unlink(missing_ok=True)
        return Part(kind=kind, path=str(decoded))


async def _decode(kind: str, source: Path, target: Path, param: str) -> float:
    asked = json.dumps({"kind": kind, "source": str(source), "target": str(target)})
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sgl_diffusion.ar.guarded",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=child_environment(),
    )
    try:
        async with asyncio.timeout(_DECODE_SECONDS):
            told, _ = await child.communicate(f"{asked}\n".encode())
    except TimeoutError:
        raise _broken(kind, param) from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise _broken(kind, param)
    answer = json.loads(told)
    if "error" in answer:
        error = from_wire(answer["error"])
        error.param = param
        raise error
    return float(answer["seconds"])


def _broken(kind: str, param: str) -> RequestError:
    return RequestError(
        f"The {kind} cannot be decoded with the time and memory that one gets.",
        hint="Send a shorter or smaller one.",
        code=f"invalid_{kind}",
        param=param,
    )
