"""Sequences that come in pieces, for layers that look at some neighbours of every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class View:
    """What a layer is given now: `steps`, of which the first is number `start` of the sequence. Its
    results for `new` among them were not there before and are final."""

    steps: Tensor
    start: int
    new: slice

    @property
    def count(self) -> int:
        return int(self.new.stop - self.new.start)


class Window:
    """Keeps the steps, along `dim`, that results of later ones need: `back` before each, and those
    that wait for the `ahead` behind them."""

    def __init__(self, back: int, ahead: int, dim: int) -> None:
        self._back, self._ahead, self._dim = back, ahead, dim
        self._kept: Tensor | None = None
        self._first = 0  # of those that are kept
        self._done = 0

    def take(self, fresh: Tensor, *, last: bool) -> View:
        dim = self._dim
        here = fresh if self._kept is None else torch.cat([self._kept, fresh], dim=dim)
        end = self._first + here.shape[dim]
        done, ready = self._done, end if last else max(end - self._ahead, self._done)
        start = max(done - self._back, 0)
        steps = here.narrow(dim, start - self._first, end - start)
        keep = max(ready - self._back, 0)
        # A copy: what is not kept should not be held.
        self._kept = here.narrow(dim, keep - self._first, end - keep).clone()
        self._first, self._done = keep, ready
        return View(steps, start, slice(done - start, ready - start))
