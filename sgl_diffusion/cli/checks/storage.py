"""The data folder, its disk, and the hub's cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.paths import data_folder
from sgl_diffusion.cli.checks.types import Check, failed, ok, refused, warning
from sgl_diffusion.orchestrator import datalock
from sgl_diffusion.orchestrator.jobdb import NETWORK_FILE_SYSTEMS, filesystem_of

_GB = 1e9
_SHARED_MEMORY = Path("/dev/shm")
_LITTLE_SHARED_MEMORY = 1.0  # GB: containers have 0.07 unless they are given more


def checks(options: ServeOptions) -> Iterator[Check]:
    try:
        folder = data_folder(options.data_dir)
    except SetupError as error:
        yield refused("data folder", error)
    else:
        yield data(folder)
        yield disk(folder, options.min_free_gb)
    if options.num_gpus > 1:
        yield shared_memory(_SHARED_MEMORY)
    if options.database_url is not None:
        yield database(options.database_url)
    yield cache()


def data(folder: Path) -> Check:
    """Whether it can be used and is not in use."""
    kind = filesystem_of(folder)
    if kind in NETWORK_FILE_SYSTEMS:
        fix = "Name a folder on a local disk with --data-dir."
        return warning("data folder", f"{folder} is on a network file system ({kind})", fix)
    try:
        os.close(datalock.lock(folder))
    except SetupError as error:
        return warning("data folder", error.message, error.hint)
    return ok("data folder", f"{folder} ({kind or 'unknown file system'})")


def disk(folder: Path, least_gb: float) -> Check:
    free = shutil.disk_usage(folder).free / _GB
    found = f"{free:.1f} GB free for results"
    if free < least_gb:
        fix = "Make room, or lower --min-free-gb."
        return failed("disk", f"{found}; with less than {least_gb:g} no job is taken", fix)
    return ok("disk", found)


def shared_memory(folder: Path) -> Check:
    """What the ranks of one model talk through; a single one needs none of it."""
    free = shutil.disk_usage(folder).free / _GB if folder.is_dir() else 0.0
    found = f"{free:.2f} GB free in {folder} for several ranks"
    if free < _LITTLE_SHARED_MEMORY:
        fix = "Start the container with --shm-size=4g, or --ipc=host."
        return warning("shared memory", found, fix)
    return ok("shared memory", found)


def database(url: str) -> Check:
    """Whether the shared job table can be reached. The URL is not shown: it may hold a password."""
    try:
        import psycopg
    except ImportError:
        return failed("database", "psycopg is missing", "pip install 'sgl-diffusion[postgres]'")
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            info = connection.info
            version = f"{info.server_version // 10000}.{info.server_version % 10000}"
            return ok("database", f"PostgreSQL {version}, database {info.dbname}")
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        return failed("database", reason, "Check --database-url, and that the database runs.")


def cache() -> Check:
    """Where downloads go: the nearest folder that exists has to take them."""
    from sgl_diffusion.loader.cache import cached_models, hub_cache

    folder = hub_cache()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fix = "Name another folder with HF_HOME."
        return warning("hub cache", f"{folder} cannot be written: downloads will fail", fix)
    count = len(cached_models(folder))
    free = shutil.disk_usage(there).free / _GB
    return ok("hub cache", f"{folder}: models: {count}, {free:.1f} GB free")
