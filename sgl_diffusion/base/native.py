"""The native library: where it is, and loading it once.

Its ops appear as `torch.ops.sgld.*`. A process without it computes and reads in other ways.
"""

from __future__ import annotations

import threading
from pathlib import Path

import sgl_diffusion
from sgl_diffusion.base import env
from sgl_diffusion.base.errors import ConfigError

_NEWEST = "read_weights"  # a library without this op is older than the code
_lock = threading.RLock()
_absent: str | None = None


def path() -> Path:
    """Where the library is, or would be."""
    named = str(env.get("SGLD_LIBRARY"))
    return Path(named or Path(sgl_diffusion.__file__).parent / "_lib" / "libsgld.so")


def absent() -> str:
    """Why the native library cannot be used in this process, or "" when it is loaded."""
    global _absent
    with _lock:
        if _absent is None:
            _absent = load(path())
        return _absent


def load(file: Path) -> str:
    """Load a file; the reason if it cannot. A named file must load."""
    import torch

    if not file.exists():
        reason = f"the native library {file.name} is not built; run `pip install -e .` to build it"
    else:
        try:
            torch.ops.load_library(file)  # type: ignore[no-untyped-call]
            old = not hasattr(torch.ops.sgld, _NEWEST)
            reason = f"{file.name} is older than this code; run `pip install -e .` again" * old
        except OSError as error:
            reason = f"the native library cannot be loaded ({error}); run `pip install -e .` again"
    if reason and env.get("SGLD_LIBRARY"):
        raise ConfigError(f"SGLD_LIBRARY={file}: {reason}.", hint="Name another file or none.")
    return reason
