"""One server for one data folder: a lock file that names its owner and ends with the process."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from sgl_diffusion.base.errors import SetupError


def lock(folder: Path) -> int:
    """An open, locked descriptor of `folder`/lock; SetupError names the process that holds it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise SetupError(
            f"The data folder {folder} is used by process {owner}.",
            hint="Stop that server, or give another folder with --data-dir.",
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:  # a full disk takes an empty file, and not a line in it
        os.close(descriptor)
        raise _unusable(folder, error) from None
    return descriptor


def _unusable(folder: Path, error: OSError) -> SetupError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SetupError(
        f"The data folder {folder} cannot be used: {error.strerror}.",
        hint="Make room, or give another folder with --data-dir."
        if full
        else "Give a folder you may write to with --data-dir.",
    )
