"""An outbox that writes down what a worker reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sgl_diffusion.base.errors import SglError


@dataclass
class RecordingOutbox:
    """Implements `orchestrator.stage.Outbox`; `on_poll` runs whenever the worker looks up."""

    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, list[tuple[dict[str, Any], list[torch.Tensor]]]] = field(default_factory=dict)
    errors: dict[str, SglError] = field(default_factory=dict)
    steps: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    on_poll: Callable[[], None] = lambda: None

    def loading(self, note: str) -> None:
        self.notes.append(note)

    def progress(self, job_id: str, step: int, total: int, phase: str) -> None:
        self.steps.setdefault(job_id, []).append((phase, step, total))

    def output(
        self, job_id: str, meta: dict[str, Any], arrays: list[Any], *, final: bool = True
    ) -> None:
        assert job_id not in self.outputs, "a job ends once"
        if final:
            self.outputs[job_id], self.meta[job_id] = arrays, meta
        else:
            self.parts.setdefault(job_id, []).append((meta, arrays))

    def hand_on(self, job_id: str, stage: str, meta: dict[str, Any], arrays: list[Any]) -> None:
        raise AssertionError("every stage is in this process")

    def failed(self, job_id: str, error: SglError) -> None:
        assert job_id not in self.errors and job_id not in self.outputs, "a job ends once"
        self.errors[job_id] = error

    def poll(self) -> None:
        self.on_poll()
