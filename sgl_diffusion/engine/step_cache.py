"""Steps that reuse what the one before computed, for requests that ask for it.

Every step runs the first block. If that changes the stream of tokens nearly as it did in the last
step that ran whole, the other blocks are left out, and what they added then is added again. It is
an approximation: off unless a request turns it on, and its memory belongs to one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.job import Row
from sgl_diffusion.engine.parallel.families import FAMILIES
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.transformers import transformers

Stream = tuple[Tensor, ...]  # the tokens that go through the blocks: of the image, of the text


@dataclass
class Memory:
    """Of the last step of a row that ran whole: what the first block added to the stream, and what
    the others did; `trunk` tells one transformer from another."""

    trunk: object
    first: Stream
    rest: Stream


class StepCache:
    """Hooks itself into the transformers of a pipeline; without a row it does nothing."""

    def __init__(self, pipeline: Pipeline, counters: Counters) -> None:
        self._counters = counters
        self._row: Row | None = None
        self._thread = 0
        for model in transformers(pipeline):
            _Trunk(self, FAMILIES[type(model)].trunk(model))

    @contextmanager
    def of(self, row: Row | None) -> Iterator[None]:
        """While it lasts, forward passes are steps of this row, which asked for it."""
        if row is None:
            yield
            return
        self._row, self._thread = row, get_ident()
        try:
            yield
        finally:
            self._row = None

    @property
    def threshold(self) -> float:
        """0 if the pass under way has no part in it."""
        if self._row is None or self._thread != get_ident():
            return 0.0
        return self._row.job.params.teacache_threshold or 0.0

    def recall(self, trunk: object, first: Stream) -> Memory | None:
        """What is remembered of this row, if its step can reuse it."""
        assert self._row is not None
        memory = self._row.memory
        if memory is None or memory.trunk is not trunk:
            return None
        return memory if _change(first, memory.first) < self.threshold else None

    def keep(self, memory: Memory | None) -> None:
        """Of a step that ran whole; None after one that reused what there was."""
        assert self._row is not None
        result = "reused" if memory is None else "computed"
        self._counters.add("step_cache_steps_total", result=result)
        if memory is None:
            self._row.reused += 1
        else:
            self._row.memory = memory


class _Trunk:
    """The blocks of one transformer, which the stream goes through one after the other."""

    def __init__(self, cache: StepCache, blocks: list[nn.Module]) -> None:
        self._cache = cache
        self._last = len(blocks) - 1
        self._memory: Memory | None = None  # what this step reuses
        self._first: Stream = ()  # what the first block of this step added, and what came of it
        self._begun: Stream = ()
        self._widths = [1] * len(blocks)  # how many tensors each block gives
        if self._last > 0:
            for place, block in enumerate(blocks):
                block.forward = self._around(place, block.forward)

    def _around(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self._cache.threshold == 0.0:
                return forward(*args)
            if place == 0:
                return self._begin(args, forward(*args))
            if self._memory is not None:
                return self._pass_by(place, args)
            output = forward(*args)
            stream = _stream(output)
            self._widths[place] = len(stream)
            if place == self._last:
                rest = tuple(
                    now - then
                    for now, then in zip(stream, _joined(self._begun, stream), strict=True)
                )
                self._cache.keep(Memory(self, self._first, rest))
                self._first = self._begun = ()
            return output

        return run

    def _begin(self, args: tuple[Any, ...], output: Any) -> Any:
        self._begun = _stream(output)
        before = args[: len(self._begun)]
        self._first = tuple(now - then for now, then in zip(self._begun, before, strict=True))
        self._memory = self._cache.recall(self, self._first)
        return output

    def _pass_by(self, place: int, args: tuple[Any, ...]) -> Any:
        assert self._memory is not None
        stream = args[: self._widths[place]]
        if place == self._last:
            rest = self._memory.rest
            stream = tuple(now + more for now, more in zip(stream, rest, strict=True))
            self._cache.keep(None)
            self._memory, self._first, self._begun = None, (), ()
        return stream[0] if len(stream) == 1 else stream


def _stream(output: Any) -> Stream:
    return output if isinstance(output, tuple) else (output,)


def _joined(begun: Stream, like: Stream) -> Stream:
    """What the first block gave, as the last one has it: in FLUX text and image become one."""
    return begun if len(begun) == len(like) else (torch.cat(begun, dim=1),)


def _change(now: Stream, then: Stream) -> float:
    """How far apart, relative to what there was; of the row's two branches the larger."""
    if any(a.shape != b.shape for a, b in zip(now, then, strict=True)):
        return float("inf")
    apart = _size([a - b for a, b in zip(now, then, strict=True)])
    return float((apart / _size(then)).max())


def _size(stream: Sequence[Tensor]) -> Tensor:
    """[B], the sum of the absolute values."""
    return torch.stack([x.abs().flatten(1).sum(1, dtype=torch.float32) for x in stream]).sum(0)
