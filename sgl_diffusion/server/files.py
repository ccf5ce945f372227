"""Outputs on disk: written under another name, flushed, renamed; readers see whole files only."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sgl_diffusion.base.errors import EngineError, SetupError, UnavailableError
from sgl_diffusion.server.ids import is_id
from sgl_diffusion.server.media import IMAGE_TYPES, VIDEO_VARIANTS

_PART = ".part"


class Files:
    """The folders `images`, `videos` and `inputs` under the data folder."""

    def __init__(self, root: Path) -> None:
        self.images = root / "images"
        self.videos = root / "videos"
        self._inputs = root / "inputs"
        for folder in (self.images, self.videos, self._inputs):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"The folder {folder} cannot be made: {error.strerror}.",
                    hint="Move away what is there, or use another --data-dir.",
                ) from None
            for left_over in folder.glob(f"*{_PART}"):  # of a process that died while writing
                left_over.unlink(missing_ok=True)
        for left_over in self._inputs.glob("image_*"):  # image jobs end with their server
            shutil.rmtree(left_over, ignore_errors=True)

    def inputs(self, job_id: str) -> Path:
        """The folder of the pictures that came with a job; whoever ends the job removes it."""
        assert is_id(job_id, "image") or is_id(job_id, "video"), job_id
        return self._inputs / job_id

    def video(self, video_id: str, index: int = 0, variant: str = "video") -> Path:
        """A file of a video job; `index` counts its outputs."""
        assert is_id(video_id, "video") and index >= 0, video_id
        number = f"_{index}" if index else ""
        return self.videos / f"{video_id}{number}{VIDEO_VARIANTS[variant][0]}"

    def image(self, image_id: str, index: int, kind: str) -> Path:
        assert is_id(image_id, "image") and index >= 0 and kind in IMAGE_TYPES
        return self.images / f"{image_id}_{index}.{kind}"


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then give it its name for good."""
    part = path.with_name(f".{path.name}{_PART}")
    try:
        write(part)
        _flush(part)
        part.rename(path)
        _flush(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnavailableError(
                "The disk of the server is full.",
                hint="Delete old videos or give it more room.",
                code="insufficient_storage",
            ) from None
        raise EngineError(
            f"The result cannot be written: {os.strerror(error.errno or errno.EIO)}."
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
