"""The row of a durable job, and how its fields become columns and JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["queued", "in_progress", "completed", "failed"]
OVER = ("completed", "failed")


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """One durable job. `payload`, `error` and `files` are any JSON; stamps are wall clock.

    `model` and `adapters` say what the job was accepted for: it runs on nothing else. `attempts`
    counts runs that a worker began, `interruptions` server restarts under it. `owner` is the id of
    the API key that sent it; `idempotency_key` and `body_hash` recognise the same request.
    """

    id: str
    kind: str
    payload: dict[str, Any]
    status: Status = "queued"
    progress: int = 0
    attempts: int = 0
    interruptions: int = 0
    created_at: float = field(default_factory=time.time)
    completed_at: float | None = None
    expires_at: float | None = None
    error: dict[str, Any] | None = None
    files: list[dict[str, Any]] = field(default_factory=list)
    model: str = ""
    adapters: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    owner: str = ""
    idempotency_key: str | None = None
    body_hash: str = ""

    @property
    def over(self) -> bool:
        return self.status in OVER


COLUMNS = tuple(f.name for f in dataclasses.fields(JobRow))
_JSON = frozenset({"payload", "error", "files", "adapters", "seeds"})


def encode(values: Mapping[str, Any]) -> dict[str, Any]:
    """Column values of fields."""
    return {
        name: json.dumps(value) if name in _JSON and value is not None else value
        for name, value in values.items()
    }


def decode(values: tuple[Any, ...]) -> JobRow:
    """The row of what `SELECT` in the order of COLUMNS found."""
    fields = dict(zip(COLUMNS, values, strict=True))
    for name in _JSON:
        if fields[name] is not None:
            fields[name] = json.loads(fields[name])
    return JobRow(**fields)
