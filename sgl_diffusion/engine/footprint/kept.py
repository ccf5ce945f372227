"""What was counted at an earlier start, kept in the data folder: counting takes its seconds."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import msgspec

from sgl_diffusion.base.footprint import Footprint
from sgl_diffusion.base.log import get_logger

log = get_logger(__name__)

FOLDER = "footprints"
_MOST = 64  # files; the oldest go


class _File(msgspec.Struct, forbid_unknown_fields=True):
    identity: str
    footprint: Footprint


class Kept:
    """The results in one data folder, each under the identity of its pipeline."""

    def __init__(self, data: Path) -> None:
        self._folder = data / FOLDER

    def find(self, identity: str) -> Footprint | None:
        """None where there is none, or none that can be trusted."""
        try:
            found = msgspec.json.decode(self._file(identity).read_bytes(), type=_File)
        except (OSError, ValueError):  # of msgspec, too
            return None
        return found.footprint if found.identity == identity else None

    def keep(self, identity: str, footprint: Footprint) -> None:
        content = {"identity": identity, "footprint": dataclasses.asdict(footprint)}
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            # Renamed into place: a start beside this one never reads half a file.
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(content))
            os.replace(name, self._file(identity))
            self._forget_the_oldest()
        except OSError as error:
            log.info("what requests take is counted again at the next start: %s", error.strerror)

    def _forget_the_oldest(self) -> None:
        files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in files[:-_MOST]:
            file.unlink(missing_ok=True)

    def _file(self, identity: str) -> Path:
        return self._folder / f"{identity}.json"
