"""Where the outputs of a command go: a file or a folder, under which names."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import RequestError, SetupError
from sgl_diffusion.cli.args import UsageError

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Generation

_KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4"}


def _cannot(path: Path, error: OSError) -> SetupError:
    return SetupError(
        f"Cannot write to {path}: {os.strerror(error.errno or errno.EIO)}.",
        hint="Name another folder or file with --output-path.",
    )


@dataclass(frozen=True)
class Target:
    """Where the outputs go. `kind` is None for a folder: the result decides."""

    path: Path
    kind: str | None
    quality: int | None

    @classmethod
    def of(cls, output_path: str, quality: int | None) -> Target:
        """Checked and made before the model is loaded: nobody waits minutes for a typing error."""
        path = Path(output_path).expanduser()
        suffix = path.suffix.lower()
        kind = None if path.is_dir() else _KINDS.get(suffix)
        if kind is None and suffix and not path.is_dir():
            raise UsageError(
                f"--output-path {output_path!r} has an unknown ending.",
                hint=f"Use one of {' '.join(_KINDS)}, or a folder.",
            )
        if quality is not None and not 0 <= quality <= 100:
            raise RequestError("output_compression must be from 0 to 100.")
        folder = path if kind is None else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise _cannot(path, error) from None
        return cls(path, kind, quality)

    def frames(self, wanted: int | None) -> int | None:
        """How many to ask for: a file of a picture takes one."""
        if self.kind in (None, "mp4"):
            return wanted
        if wanted not in (None, 1):
            raise UsageError(f"{wanted} frames do not fit into a .{self.kind} file.")
        return 1

    def write(self, result: Generation, model: str | None) -> list[Path]:
        """`model` is the name that the files carry with their settings, None to leave them out."""
        from sgl_diffusion.server import media
        from sgl_diffusion.server.files import put_file
        from sgl_diffusion.server.metadata import settings_text

        params = result.params
        kind = self.kind or ("mp4" if params.num_frames > 1 else "png")
        written = []
        for index, clip in enumerate(result.clips):
            path = self._name(index, kind, result)

            settings = None if model is None else settings_text(params, model, index)

            def write(part: Path, clip: Any = clip, settings: str | None = settings) -> None:
                if kind == "mp4":
                    quality = media.VIDEO_QUALITY if self.quality is None else self.quality
                    media.encode_video(
                        clip, part, fps=params.fps, quality=quality, settings=settings
                    )
                else:
                    quality = media.IMAGE_QUALITY if self.quality is None else self.quality
                    part.write_bytes(media.encode_image(clip[0], kind, quality, settings))

            try:
                put_file(path, write)
            except OSError as error:
                raise _cannot(path, error) from None
            written.append(path)
        return written

    def _name(self, index: int, kind: str, result: Generation) -> Path:
        if self.kind is not None:
            if len(result.clips) == 1:
                return self.path
            return self.path.with_name(f"{self.path.stem}-{index}{self.path.suffix}")
        words = "-".join(re.findall(r"\w+", result.params.prompt.lower()))[:60] or "output"
        stem = f"{words}-{result.params.seeds[index]}"
        path = self.path / f"{stem}.{kind}"
        count = 2
        while path.exists():  # an earlier output is never overwritten
            path = self.path / f"{stem}-{count}.{kind}"
            count += 1
        return path
