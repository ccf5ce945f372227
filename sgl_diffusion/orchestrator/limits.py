"""How long things may take and how much may wait, and the health that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["loading", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Numbers of the supervision contract. Seconds unless the name says otherwise.

    A stage is silent when no frame came for `silence`, or for three median steps if that is longer;
    one that computes on a CPU, when none came for `load_silence`.
    """

    heartbeat: float = 1.0
    silence: float = 120.0
    load_silence: float = 1800.0
    leave: float = 5.0
    term: float = 10.0
    backoff_first: float = 1.0
    backoff_most: float = 60.0
    steady: float = 10.0
    deaths: int = 5
    deaths_window: float = 600.0
    attempts: int = 2
    credits: int = 8


@dataclass(frozen=True)
class Health:
    """The state of the stage, why, how often it was restarted, and for how long it is in it.

    `ready` means that a job would run now. "failed" covers a stage that cannot start and one that
    died too often lately; both are still retried.
    """

    state: State
    reason: str = ""
    restarts: int = 0
    seconds: float = 0.0

    @property
    def ready(self) -> bool:
        return self.state == "ready"
