"""Python, the packages beside it, and the database that comes with it."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import sgl_diffusion
from sgl_diffusion.cli.checks.types import Check, failed, ok, warning

DISTRIBUTION = "sgl-diffusion"
_LEAST_PYTHON = (3, 11)
_LEAST_SQLITE = (3, 38)  # the job table asks for parts of JSON


def checks() -> Iterator[Check]:
    yield python(sys.version_info[:3])
    yield packages(DISTRIBUTION)
    yield sqlite(sqlite3.sqlite_version_info)
    yield clock(time.time())


def python(version: tuple[int, ...]) -> Check:
    found = f"{'.'.join(map(str, version))} ({sys.executable})"
    if version < _LEAST_PYTHON:
        least = ".".join(map(str, _LEAST_PYTHON))
        return failed("python", found, f"Make the environment with Python {least} or later.")
    return ok("python", found)


def packages(distribution: str) -> Check:
    """What the package requires, and what is installed."""
    from packaging.requirements import Requirement

    try:
        needed = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return ok("packages", f"{distribution} is not installed: it runs from {_tree()}")
    wrong, count = [], 0
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return failed("packages", "; ".join(wrong), f"pip install --upgrade {distribution}")
    return ok("packages", f"all {count} that {distribution} {sgl_diffusion.__version__} needs")


def _tree() -> Path:
    return Path(sgl_diffusion.__file__).parents[1]


def sqlite(version: tuple[int, ...]) -> Check:
    found = ".".join(map(str, version))
    if version < _LEAST_SQLITE:
        least = ".".join(map(str, _LEAST_SQLITE))
        return failed("sqlite", found, f"Use a Python whose SQLite is {least} or later.")
    return ok("sqlite", found)


def clock(now: float) -> Check:
    """A clock before the day on which this file was written breaks TLS and the age of jobs."""
    written = Path(__file__).stat().st_mtime
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < written - 24 * 3600:
        return warning("clock", f"{found}, before this package was installed", "Set the clock.")
    return ok("clock", found)
