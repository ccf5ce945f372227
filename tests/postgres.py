"""A real PostgreSQL in a folder of its own, reached by a socket there and by nobody else."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def programs() -> Path | None:
    """The folder of initdb and postgres; Debian keeps it out of PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def somebody() -> str | None:
    """A user to run as: PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody", "daemon") if name in known)


@contextmanager
def running() -> Iterator[str]:
    """The URL of a database that is gone at the end."""
    bin_folder, user = programs(), somebody()
    if bin_folder is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:  # a path for a socket
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        command = [bin_folder / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-N"]
        subprocess.run([*command, "-E", "UTF8", "--locale=C.UTF-8"], user=user, check=True,
                       capture_output=True, cwd=folder)  # fmt: skip
        options = f"-k {folder} -c fsync=off -c listen_addresses= -c shared_buffers=16MB"

        def control(*words: str) -> None:
            command = [bin_folder / "pg_ctl", "-D", data, "-w", "-t", "100", *words]
            quiet = subprocess.DEVNULL
            subprocess.run(command, user=user, check=True, stdout=quiet, cwd=folder)

        # No child of ours: other tests count the children of this process and kill them.
        control("-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://tests@/postgres?host={folder}"
        finally:
            control("-m", "fast", "stop")  # sessions are cut off


def fresh(url: str) -> None:
    """Forget every table."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
