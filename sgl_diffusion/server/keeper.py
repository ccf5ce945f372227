"""What is kept and for how long: retention, the cap on kept bytes, orphans, the free disk."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from sgl_diffusion.base.config import JobOptions
from sgl_diffusion.base.errors import SglError, UnavailableError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator.jobstore import JobRow, JobStore
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server.files import Files

log = get_logger(__name__)
T = TypeVar("T")

_EVERY = 30.0
_AT_ONCE = 100  # rows that are read before they go
_ORPHAN_AGE = 3600.0
_GB = 10**9
_OWNER = re.compile(r"\.?((?:video|image)_[0-9A-Za-z]+)")


class Keeper:
    """Asks for the free disk at most once a second; tidies up every half minute."""

    def __init__(self, jobs: JobStore, files: Files, options: JobOptions) -> None:
        self._jobs = jobs
        self._files = files
        self._options = options
        self._free = (0.0, 0)
        self._kept = 0
        self._task: asyncio.Task[None] | None = None

    # -- the disk ---------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        now = time.monotonic()
        if not self._free[1] or now - self._free[0] > 1.0:
            found = os.statvfs(self._files.root)
            self._free = (now, found.f_bavail * found.f_frsize)
        return self._free[1]

    def low(self) -> str:
        """Why nothing more fits on the disk; "" where it does."""
        free, least = self.free_bytes(), self._options.min_free_gb * _GB
        if free >= least:
            return ""
        return f"The disk of the server has {free / _GB:.1f} GB free, and {least / _GB:g} are kept."

    def check(self) -> None:
        if why := self.low():
            raise UnavailableError(
                why,
                hint="Delete old videos, or ask the operator (--min-free-gb).",
                code="insufficient_storage",
            )

    def expires_at(self) -> float:
        """When a job that is over now will be forgotten."""
        return time.time() + self._options.retention_hours * 3600

    def metrics(self) -> list[Metric]:
        return [
            Metric("disk_free_bytes", self.free_bytes(), kind="gauge"),
            Metric("stored_bytes", self._kept, kind="gauge"),
        ]

    # -- tidying up -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Compare files and rows once, then keep tidying up."""
        await self._compare()
        await self.tidy()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def tidy(self) -> None:
        """Forget what is too old, and the oldest of what is too much."""
        now, most = time.time(), self._options.max_disk_gb * _GB
        ended = now - self._options.retention_hours * 3600
        while rows := await self._jobs.due(now, ended, _AT_ONCE):
            for row in rows:
                await self._expire(row, "age")
        while await self._jobs.kept_bytes() > most and (rows := await self._jobs.oldest(1)):
            await self._expire(rows[0], "disk")
        self._kept = await self._jobs.kept_bytes()
        await self._jobs.prune()
        if self._jobs.shared:  # another server may have deleted what is here
            here = await _in_thread(partial(_owners, self._files))
            await self._sweep(here - set(await self._jobs.absent(list(here))))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            try:
                await self.tidy()
            except SglError as error:
                log.error("old jobs cannot be removed now: %s", error)

    async def _expire(self, row: JobRow, why: str) -> None:
        # The row goes first: files without a row are swept, a row without files is a lie.
        await self._jobs.expire(row.id, why)
        await _in_thread(partial(self._files.remove, row.id))
        log.info("%s %s is not kept any longer (%s)", row.kind, row.id, why)

    async def _compare(self) -> None:
        """At start: rows whose files are gone, and files whose row is."""
        for row in await self._jobs.over():
            if row.status == "completed" and not self._files.has(row.files):
                await self._expire(row, "file gone")
        await self._sweep(await self._jobs.ids())

    async def _sweep(self, known: set[str]) -> None:
        for path in await _in_thread(partial(_orphans, self._files, known)):
            log.warning("%s belongs to no job and is removed", path.name)
            await _in_thread(partial(self._files.discard, path))


def _orphans(files: Files, known: set[str]) -> list[Path]:
    return [path for path in _paths(files) if _is_orphan(path, known)]


def _owners(files: Files) -> set[str]:
    """Ids of the jobs that have something here."""
    found = (_OWNER.match(path.name) for path in _paths(files))
    return {owner[1] for owner in found if owner is not None}


def _paths(files: Files) -> Iterator[Path]:
    for folder in files.folders:
        yield from folder.iterdir()


def _is_orphan(path: Path, known: set[str]) -> bool:
    owner = _OWNER.match(path.name)
    if owner is None or owner[1] in known:
        return False
    try:
        return time.time() - path.stat().st_mtime > _ORPHAN_AGE
    except OSError:
        return False  # gone meanwhile


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work)
