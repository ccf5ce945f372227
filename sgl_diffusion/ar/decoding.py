"""One token of every running row of a decoder: as it comes, or in fixed shapes that are recorded.

A recording is a pass that is made again without Python, as a CUDA graph is. It needs the same
memory each time, so rows are padded to one of few counts, and the keys that are looked at to one of
few lengths; what is masked away changes nothing. Rows of padding write where nobody is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.kv import KvSlab
from sgl_diffusion.base.errors import SetupError

_SHORTEST = 256

# Logits [rows, vocabulary] and states [rows, width].
Found = tuple[Tensor, Tensor]
# Of inputs [rows, ...] at positions [rows]; the mask is that of the slab.
Forward = Callable[[Tensor, Tensor, Tensor], Found]


@dataclass(frozen=True, eq=False)
class Recording:
    """`replay` makes the pass again, from and to the same memory."""

    replay: Callable[[], Any]
    found: Found


# Makes the pass, and a recording of it.
Record = Callable[[Callable[[], Found]], Recording]


class Decoding:
    def __init__(self, kv: KvSlab, forward: Forward, record: Record | None = None) -> None:
        self._kv, self._forward, self._record = kv, forward, record
        self._recorded: dict[tuple[int, int], tuple[list[Tensor], Recording]] = {}
        self._slab = 0

    def step(self, inputs: Tensor, positions: Tensor, writing: Sequence[bool]) -> Found:
        """`inputs` [rows, ...] and `positions` [rows] are those of the rows in the slab."""
        if self._record is None:
            return self._forward(inputs, positions, self._kv.decode(writing))
        at, kv = self._kv.advance(writing), self._kv
        if self._slab != kv.address:  # it has grown: recordings know the old one
            self._recorded.clear()
            self._slab = kv.address
        shape = (_count(len(at), kv.most), _length(kv.longest, kv.capacity))
        given = (inputs, positions, at)
        if shape not in self._recorded:
            self._recorded[shape] = self._make(shape, given)
        fixed, recording = self._recorded[shape]
        _fill(fixed, given)
        recording.replay()
        logits, states = recording.found
        return logits[: len(at)].clone(), states[: len(at)].clone()

    def _make(
        self, shape: tuple[int, int], given: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], Recording]:
        rows, end = shape
        fixed = [each.new_zeros(rows, *each.shape[1:]) for each in given]
        _fill(fixed, given)

        def run() -> Found:
            inputs, positions, at = fixed
            return self._forward(inputs, positions, self._kv.aim(at, end))

        assert self._record is not None
        return fixed, self._record(run)


def _fill(fixed: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    for place, fresh in zip(fixed, given, strict=True):
        place[: len(fresh)] = fresh
        place[len(fresh) :] = 0


def _count(rows: int, most: int) -> int:
    return min(1 << (rows - 1).bit_length(), most)


def _length(longest: int, capacity: int) -> int:
    return min(max(1 << (longest - 1).bit_length(), _SHORTEST), capacity)


def cuda_graph(run: Callable[[], Found]) -> Recording:
    """Not yet run on a GPU."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(beside):  # what is only done the first time is not recorded
            run()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(graph):
            found = run()
    except RuntimeError as error:
        raise SetupError(
            "The steps of this model cannot be recorded as CUDA graphs.",
            hint="Leave out --cuda-graphs.",
            code="unsupported_model",
        ) from error
    return Recording(graph.replay, found)
