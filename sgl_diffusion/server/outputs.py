"""The files of a finished video job: an mp4, a thumbnail and a sheet of frames per output."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion.server.files import Files, write_file
from sgl_diffusion.server.media import encode_video
from sgl_diffusion.server.metadata import settings_text
from sgl_diffusion.server.previews import spritesheet, thumbnail

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Generation


def write_video_files(
    files: Files, generation: Generation, payload: dict[str, Any], *, metadata: bool
) -> list[dict[str, Any]]:
    """Encode and write everything; returns one entry per file, those of the videos first.

    Runs in a thread. An error leaves none of the files behind.
    """
    params, video_id = generation.params, generation.job_id
    written: list[dict[str, Any]] = []

    def write(variant: str, index: int, fill: Any) -> None:
        path = files.video(video_id, index, variant)
        write_file(path, fill)
        size = path.stat().st_size
        written.append({"name": path.name, "variant": variant, "index": index, "bytes": size})

    try:
        for index, clip in enumerate(generation.clips):
            settings = settings_text(params, payload["model"], index) if metadata else None
            encode = partial(
                encode_video,
                clip,
                fps=params.fps,
                quality=int(payload["quality"]),
                preset=payload.get("preset", "fast"),
                settings=settings,
            )
            write("video", index, encode)
        for index, clip in enumerate(generation.clips):
            write("thumbnail", index, partial(_put, thumbnail(clip)))
            write("spritesheet", index, partial(_put, spritesheet(clip)))
    except BaseException:
        for entry in written:
            (files.videos / entry["name"]).unlink(missing_ok=True)
        raise
    written[0]["seconds"] = generation.seconds
    written[0]["peak_memory_mb"] = generation.peak_memory_mb
    return written


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)
