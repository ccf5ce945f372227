"""A set of ranks and the collectives that this package uses among them.

A group of one rank needs no process group and copies nothing. A collective that fails, because a
rank is gone or silent, raises `RankLostError`: after that no group can be used any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankLostError(Exception):
    """The ranks cannot go on together."""


class Group:
    """`index` is the place of this rank among `ranks`; `handle` is torch's process group."""

    def __init__(self, ranks: Sequence[int], rank: int, handle: Any = None) -> None:
        assert rank in ranks and (handle is not None or len(ranks) == 1)
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(rank)
        self._handle = handle

    @property
    def size(self) -> int:
        return len(self.ranks)

    def gather(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """`x` [B, S, ...] of every rank; `lengths` says how long each is."""
        if self.size == 1:
            return [x]
        most = max(lengths)
        padded = x.new_zeros(x.shape[0], most, *x.shape[2:])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        with _together():
            dist.all_gather(parts, padded, group=self._handle)
        return [part[:, :length] for part, length in zip(parts, lengths, strict=True)]

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send `parts[i]`, flat, to rank i; returns what each rank sent, `sizes[i]` values."""
        if self.size == 1:
            return list(parts)
        target = parts[0].new_empty(sum(sizes))
        with _together():
            dist.all_to_all_single(
                target,
                torch.cat(list(parts)),
                list(sizes),
                [part.numel() for part in parts],
                self._handle,
            )
        return list(target.split(list(sizes)))

    def pass_on(self, x: Tensor, size: int) -> tuple[Tensor, Callable[[], None]]:
        """Send flat `x` to the next rank and get `size` values from the one before.

        Returns at once; the second result waits until the first one may be read and `x` written.
        """
        target = x.new_empty(size)
        after = self.ranks[(self.index + 1) % self.size]
        before = self.ranks[(self.index - 1) % self.size]
        with _together():
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, x, after, self._handle),
                    dist.P2POp(dist.irecv, target, before, self._handle),
                ]
            )

        def wait() -> None:
            with _together():
                for work in works:
                    work.wait()

        return target, wait

    def broadcast(self, data: bytes | None) -> bytes:
        """The bytes of the first rank, on every rank; only the first rank gives some."""
        assert (data is not None) == (self.index == 0)
        if data is not None and self.size == 1:
            return data
        length = torch.tensor([len(data or b"")])
        with _together():
            dist.broadcast(length, self.ranks[0], group=self._handle)
            values = torch.empty(int(length), dtype=torch.uint8)
            if data:
                values.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(values, self.ranks[0], group=self._handle)
        return values.numpy().tobytes()

    def collect(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, on every rank."""
        if self.size == 1:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        with _together():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._handle)
        source = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        source[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        parts = [torch.empty_like(source) for _ in self.ranks]
        with _together():
            dist.all_gather(parts, source, group=self._handle)
        return [
            part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)
        ]


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # also torch's DistBackendError and the gloo timeouts
        raise RankLostError("an exchange among the ranks failed") from error
