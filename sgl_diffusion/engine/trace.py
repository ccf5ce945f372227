"""The record of a worker. On a GPU its spans are NVTX ranges, too, for Nsight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from sgl_diffusion.base.trace import Record


class Trace(Record):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._ranges = device.type == "cuda"

    def span(self, name: str, **about: Any) -> AbstractContextManager[None]:
        span = super().span(name, **about)
        return _range(name, span) if self._ranges and self.on else span


@contextmanager
def _range(name: str, span: AbstractContextManager[None]) -> Iterator[None]:
    with torch.cuda.nvtx.range(name), span:
        yield
