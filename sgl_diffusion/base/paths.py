"""Where the state of this package lives on disk."""

from __future__ import annotations

from pathlib import Path

from sgl_diffusion.base import env
from sgl_diffusion.base.errors import SetupError


def data_folder(chosen: str | None) -> Path:
    """The data folder, made private to its owner: the option, else SGLD_DATA_DIR, else XDG's."""
    try:
        if chosen or env.get("SGLD_DATA_DIR"):
            folder = Path(chosen or env.get("SGLD_DATA_DIR")).expanduser()
        else:
            home = env.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
            folder = Path(home) / "sgl_diffusion"
    except RuntimeError:  # a user without a home, or `~somebody` who does not exist
        raise SetupError(
            "The data folder is in a home directory that is not known.",
            hint="Name a folder with --data-dir.",
        ) from None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise SetupError(
            f"The data folder {folder} cannot be written: {reason}.",
            hint="Name another with --data-dir.",
        ) from None
    return folder.resolve()
