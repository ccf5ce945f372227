"""A real PostgreSQL in a folder of its own, reached by a socket there and by nobody else."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
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
    try:
        import psycopg
    except ImportError:
        pytest.skip("psycopg is not installed")
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:  # a path for a socket
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        command = [bin_folder / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-N"]
        subprocess.run([*command, "-E", "UTF8", "--locale=C.UTF-8"], user=user, check=True,
                       capture_output=True, cwd=folder)  # fmt: skip
        fast = ["-c", "fsync=off", "-c", "listen_addresses=", "-c", "shared_buffers=16MB"]
        server = subprocess.Popen(
            [bin_folder / "postgres", "-D", data, "-k", folder, *fast],
            user=user,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        url = f"postgresql://tests@/postgres?host={folder}"
        try:
            deadline = time.monotonic() + 100
            while True:
                try:
                    psycopg.connect(url).close()
                    break
                except psycopg.OperationalError:
                    assert server.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # at once: SIGTERM would wait for every session
            server.wait()


def fresh(url: str) -> None:
    """Forget every table."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
