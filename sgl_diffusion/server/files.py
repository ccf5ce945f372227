"""Outputs on disk: written under another name, flushed, renamed; readers see whole files only."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import (
    EngineError,
    NotFoundError,
    SetupError,
    SglError,
    UnavailableError,
)
from sgl_diffusion.server.ids import is_id
from sgl_diffusion.server.media import IMAGE_TYPES, VIDEO_VARIANTS

if TYPE_CHECKING:
    from PIL.Image import Image

_PART = ".part"


class Files:
    """The folders `images` and `videos`, and `inputs` with a folder per job, in the data folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.videos = root / "videos"
        self.inputs = root / "inputs"
        self.folders = (self.images, self.videos, self.inputs)
        for folder in self.folders:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"The folder {folder} cannot be made: {error.strerror}.",
                    hint="Move away what is there, or use another --data-dir.",
                ) from None
            for left_over in folder.glob(f"*{_PART}"):  # of a process that died while writing
                left_over.unlink(missing_ok=True)
        for left_over in self.inputs.glob("image_*"):  # image jobs end with their server
            shutil.rmtree(left_over, ignore_errors=True)

    def folder(self, kind: str) -> Path:
        """Where the results of a job of this kind are."""
        return {"image": self.images, "video": self.videos}[kind]

    def video(self, video_id: str, index: int = 0, variant: str = "video") -> Path:
        """A file of a video job; `index` counts its outputs."""
        assert is_id(video_id, "video") and index >= 0, video_id
        number = f"_{index}" if index else ""
        return self.videos / f"{video_id}{number}{VIDEO_VARIANTS[variant][0]}"

    def image(self, image_id: str, index: int, kind: str) -> Path:
        assert is_id(image_id, "image") and index >= 0 and kind in IMAGE_TYPES
        return self.images / f"{image_id}_{index}.{kind}"

    def input(self, job_id: str, index: int) -> Path:
        """An input picture of a job; `drop_inputs` removes them together."""
        return self._inputs(job_id) / f"{index}.png"

    def write_input(self, job_id: str, index: int, picture: Image) -> None:
        """Keep a picture as `input` names it. Runs in a thread."""
        try:
            self._inputs(job_id).mkdir(mode=0o700, exist_ok=True)
            _flush(self.inputs)
        except OSError as error:
            raise _cannot_write(error) from None
        save = partial(picture.save, format="png", compress_level=1)
        write_file(self.input(job_id, index), save)

    def copy_inputs(self, source_id: str, job_id: str) -> None:
        """Give a job the pictures of another; NotFoundError when they are gone."""
        source, target = self._inputs(source_id), self._inputs(job_id)
        try:
            target.mkdir(mode=0o700)
            for picture in source.iterdir():
                shutil.copyfile(picture, target / picture.name)
        except FileNotFoundError:
            self.drop_inputs(job_id)
            raise NotFoundError(
                "The input pictures of this video are gone.", code="video_expired"
            ) from None
        except OSError as error:
            self.drop_inputs(job_id)
            raise _cannot_write(error) from None

    def drop_inputs(self, job_id: str) -> None:
        shutil.rmtree(self._inputs(job_id), ignore_errors=True)

    def _inputs(self, job_id: str) -> Path:
        assert is_id(job_id, job_id.partition("_")[0]), job_id
        return self.inputs / job_id

    def has(self, entries: list[dict[str, Any]]) -> bool:
        """Whether the files of a row are all here; those that were stored elsewhere are."""
        return all(
            "remote" in entry or (self._folder(entry["name"]) / entry["name"]).is_file()
            for entry in entries
        )

    def remove(self, job_id: str) -> None:
        """Everything that a job can have left: results, parts of them, inputs."""
        assert is_id(job_id, "video") or is_id(job_id, "image"), job_id
        for folder in self.folders:
            for path in (*folder.glob(f"{job_id}*"), *folder.glob(f".{job_id}*")):
                self.discard(path)

    def discard(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _folder(self, name: str) -> Path:
        return self.videos if name.startswith("video_") else self.images


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """As `put_file`, for a server: what goes wrong is told to clients."""
    try:
        put_file(path, write)
    except OSError as error:
        raise _cannot_write(error) from None


def put_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, then give it its name for good. Raises OSError."""
    part = path.with_name(f".{path.name}{_PART}")
    try:
        write(part)
        _flush(part)
        part.rename(path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _cannot_write(error: OSError) -> SglError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UnavailableError(
            "The disk of the server is full.",
            hint="Delete old videos or give it more room.",
            code="insufficient_storage",
        )
    return EngineError(f"The file cannot be written: {os.strerror(error.errno or errno.EIO)}.")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
