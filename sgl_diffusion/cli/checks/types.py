"""The outcome of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sgl_diffusion.base.errors import SglError

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """What was found. `failed` means that the server will not start, or will do no work; a
    `warning` that it will, but not as well as it could. Both say how to mend it."""

    name: str
    status: Status
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.status != "ok"), self


def ok(name: str, found: str) -> Check:
    return Check(name, "ok", found)


def warning(name: str, found: str, fix: str) -> Check:
    return Check(name, "warning", found, fix)


def failed(name: str, found: str, fix: str) -> Check:
    return Check(name, "failed", found, fix)


def refused(name: str, error: SglError, fix: str = "Change what it names.") -> Check:
    """What the server would end with; `fix` where the error has no next step."""
    return failed(name, error.message, error.hint or fix)
