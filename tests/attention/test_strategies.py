"""Attention spread over four ranks is attention: every strategy, unequal and odd lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion.attention import BACKENDS
from sgl_diffusion.attention.strategies.base import Lengths
from sgl_diffusion.attention.strategies.spread import strategy_of
from sgl_diffusion.distributed.layout import Layout
from sgl_diffusion.distributed.mesh import Mesh
from sgl_diffusion.ops.attention_truth import attention
from tests.distributed.ranks import Group, Ranks

LAYOUTS = [
    Layout(1, 1, 4),
    Layout(1, 4, 1),
    Layout(1, 2, 2),
    Layout(2, 1, 2),
    Layout(2, 2, 1),
]
LENGTHS = [
    Lengths((3, 3, 3, 3), (3, 3, 3, 3)),
    Lengths((5, 1, 4, 2), (2, 7, 1, 6)),
    Lengths((40, 33, 1, 17), (40, 33, 1, 17)),
]


def _errors(everyone: Group, layout: Layout, backend: str, dtype: torch.dtype) -> list[float]:
    """The largest error of this rank's results."""
    mesh = Mesh.of(layout, everyone.index, seconds=20)
    strategy = strategy_of(mesh, BACKENDS.get(backend))
    errors = []
    for case in LENGTHS:
        ranks = mesh.tokens.size
        lengths = Lengths(case.queries[:ranks], case.keys[:ranks])
        generator = torch.Generator().manual_seed(7)

        def draw(total: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(2, total, 8, 16, generator=generator).to(dtype)

        q = draw(sum(lengths.queries))
        k, v = draw(sum(lengths.keys)), draw(sum(lengths.keys))
        exact, _ = attention(*(x.float() for x in (q, 3 * k, v)), 0.25, False, None, None)
        mine = mesh.tokens.index
        own = [
            x.split(list(sizes), 1)[mine]
            for x, sizes in ((q, lengths.queries), (3 * k, lengths.keys), (v, lengths.keys))
        ]
        out = strategy.attend(*own, lengths, 0.25)
        assert out.dtype == dtype
        error = out.float() - exact.split(list(lengths.queries), 1)[mine]
        errors.append(float(error.abs().max()))
    return errors


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_strategy_is_attention(four_ranks: Ranks, layout: Layout) -> None:
    for errors in four_ranks.run(_errors, layout, "native", torch.float32):
        assert max(errors) < 4e-6


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_in_bf16(four_ranks: Ranks, layout: Layout) -> None:
    for errors in four_ranks.run(_errors, layout, "native", torch.bfloat16):
        assert max(errors) < 2e-2


@pytest.mark.parametrize("layout", [Layout(1, 1, 4), Layout(2, 1, 2)], ids=str)
def test_ulysses_takes_any_backend(four_ranks: Ranks, layout: Layout) -> None:
    for errors in four_ranks.run(_errors, layout, "sdpa", torch.float32):
        assert max(errors) < 4e-6
