"""What the stages of an omni model have in common.

What they hand on holds arrays: tensors as they are within a process, numpy's between processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion.ar.decoding import Record
from sgl_diffusion.base.errors import SglError, from_wire, to_wire
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.orchestrator.messages import Metric, Payload
from sgl_diffusion.orchestrator.stage import GraphOutbox

log = get_logger(__name__)

PREPROCESS, ENCODERS, THINKER, TALKER, CODE2WAV = STAGES = (
    *("preprocess", "encoders", "thinker", "talker", "code2wav"),
)
WARM_UP = "warm-up"


@dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """`length` is in tokens, prompt and answer; `prefix_bytes` and `media_bytes` are for what is
    kept of earlier requests. Without `speech` nothing that speaks is loaded. `look_ahead` is for
    Qwen2.5's decoder of speech, see `ar/token2wav.py`."""

    rows: int
    length: int
    prefix_bytes: int
    media_bytes: int
    speech: bool = True
    look_ahead: int | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which model a stage is a part of, and where it runs. Without a `name` the model has that of
    its family. With `record` the steps of decoders are recorded, see `ar/decoding.py`."""

    folder: Path
    name: str
    limits: ChatLimits
    device: torch.device
    dtype: torch.dtype
    record: Record | None = None


class Part(ABC):
    """One stage at work. It never ends its part of a job before all that it is fed has come."""

    def __init__(self, setting: Setting, outbox: GraphOutbox) -> None:
        self.setting = setting
        self.outbox = outbox

    @abstractmethod
    def load(self) -> Payload:
        """Load the weights; returns what this stage knows of the model's card."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run once on the job `WARM_UP`, whose outputs nobody gets: what cannot work here fails
        now, and not in every job."""

    @abstractmethod
    def feed(self, job_id: str, meta: Payload, arrays: list[Any]) -> None: ...

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """Let go of a job; unknown ids are fine."""

    @abstractmethod
    def step(self) -> bool:
        """Do one unit of work; False when there was nothing to do."""

    @abstractmethod
    def running(self) -> int: ...

    def metrics(self) -> list[Metric]:
        return []

    def fail(self, job_id: str, error: Exception) -> None:
        """This job ends here; the others and the stage go on."""
        self.cancel(job_id)
        if job_id == WARM_UP:
            raise error
        if not isinstance(error, SglError):
            log.error("job %s failed", job_id, exc_info=error)
            error = from_wire(to_wire(error))
        self.outbox.failed(job_id, error)


def tensors(arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
    return [
        each.to(device) if isinstance(each, Tensor) else torch.from_numpy(np.array(each)).to(device)
        for each in arrays
    ]


def portable(arrays: Sequence[Any]) -> list[Any]:
    """As they can leave the process: on the host, and in a precision that numpy has."""
    return [_portable(each) if isinstance(each, Tensor) else each for each in arrays]


def _portable(values: Tensor) -> Tensor:
    values = values.detach().cpu()
    return values.float() if values.dtype == torch.bfloat16 else values
