"""One small JSON file per job beside the database: what a damaged database is rebuilt from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator.jobrow import JobRow

log = get_logger(__name__)

_PART = ".part"


class Keepsakes(Protocol):
    """What is kept of rows beside their database."""

    def put(self, row: JobRow) -> None: ...
    def drop(self, job_id: str) -> None: ...
    def rows(self) -> Iterator[JobRow]: ...


class NoSidecars:
    """For a database that others keep safe."""

    def put(self, row: JobRow) -> None:
        pass

    def drop(self, job_id: str) -> None:
        pass

    def rows(self) -> Iterator[JobRow]:
        return iter(())


class Sidecars:
    """The folder `jobs` of the data folder; a file has the whole row or is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "jobs"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, row: JobRow) -> None:
        path = self._path(row.id)
        part = path.with_name(f".{path.name}{_PART}")
        try:
            with open(part, "w", opener=_private) as file:
                json.dump(dataclasses.asdict(row), file)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def drop(self, job_id: str) -> None:
        self._path(job_id).unlink(missing_ok=True)

    def names(self) -> set[str]:
        return {path.stem for path in self._folder.glob("*.json")}

    def rows(self) -> Iterator[JobRow]:
        """Every row that can be read; the log names the others."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                row = msgspec.json.decode(path.read_bytes(), type=JobRow)
            except (OSError, msgspec.MsgspecError) as error:
                log.error("%s cannot be read: %s", path, error)
                continue
            if row.id == path.stem:
                yield row

    def sweep(self, known: set[str]) -> None:
        """Remove what belongs to no row: left by a process that died between two writes."""
        for path in self._folder.iterdir():
            if path.suffix == _PART or path.stem not in known:
                path.unlink(missing_ok=True)

    def _path(self, job_id: str) -> Path:
        assert job_id and not job_id.startswith(".") and "/" not in job_id, job_id
        return self._folder / f"{job_id}.json"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
