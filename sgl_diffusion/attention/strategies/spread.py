"""The attention of a model whose tokens are spread over ranks, as the model calls it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import cast

from torch import Tensor

from sgl_diffusion.attention.base import AttentionBackend, LseBackend
from sgl_diffusion.attention.strategies.base import Alone, Lengths, Strategy
from sgl_diffusion.attention.strategies.ring import Ring
from sgl_diffusion.attention.strategies.ulysses import Ulysses
from sgl_diffusion.distributed.mesh import Mesh


def strategy_of(mesh: Mesh, backend: AttentionBackend) -> Strategy:
    """Ulysses, ring or both around a backend; a ring needs one that gives log-sum-exps."""
    inner: Strategy = Alone(backend)
    if mesh.ring.size > 1:
        assert hasattr(backend, "forward_lse"), f"{backend.name} gives no log-sum-exp"
        inner = Ring(mesh.ring, cast("LseBackend", backend))
    return Ulysses(mesh.ulysses, inner) if mesh.ulysses.size > 1 else inner


class SpreadAttention:
    """An `Attend` that is told before its calls how the tokens of each are spread.

    Told nothing, it attends on this rank alone.
    """

    def __init__(self, strategy: Strategy, backend: AttentionBackend) -> None:
        self._strategy = strategy
        self._backend = backend
        self._calls: deque[Lengths] | None = None

    def expect(self, calls: Iterable[Lengths]) -> None:
        """The lengths of the next calls, in order."""
        assert not self._calls, f"{len(self._calls)} calls that were expected did not come"
        self._calls = deque(calls)

    def reset(self) -> None:
        """Forget what was expected: the pass was given up."""
        self._calls = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        if self._calls is None:
            return self._backend.forward(q, k, v, scale=scale)
        return self._strategy.attend(q, k, v, self._calls.popleft(), scale)
