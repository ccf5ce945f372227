"""Every implementation of cfg_combine_step that runs here against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from tests.refs.solver_step import cfg_combine_step as reference

SHAPES = [(1, 1), (2, 7), (3, 16, 5, 3, 11), (2, 8192 + 5), (2, 3, 17000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _states(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, last, m0, m1 = torch.randn(4, *shape)
    return x, last, m0, m1


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(memory_bound_by: str, dtype: torch.dtype, guided: bool) -> None:
    for shape in SHAPES:
        torch.manual_seed(shape[-1])
        x, last, m0, m1 = _states(shape)
        v, u = torch.randn(2, *shape).to(dtype)
        table, guidance = torch.randn(shape[0], 9), 1 + 7 * torch.rand(shape[0])
        given = (x, v, u if guided else None, guidance if guided else None, table, last, m0, m1)
        kept = [x.clone(), last.clone(), m0.clone(), m1.clone()]
        got = ops.cfg_combine_step(*given)
        for one, exact in zip(got, reference(*given), strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.double(), exact, rtol=2e-6, atol=2e-5)
        assert all(torch.equal(a, b) for a, b in zip((x, last, m0, m1), kept, strict=True))
    assert ops.counts() == {("cfg_combine_step", memory_bound_by): len(SHAPES)}


def test_a_row_does_not_know_its_neighbours(memory_bound_by: str) -> None:
    """Bit for bit, wherever in a batch it is and however many elements it has."""
    torch.manual_seed(0)
    x, last, m0, m1 = _states((3, 41, 7))
    v, u = torch.randn(2, 3, 41, 7).bfloat16()
    table, guidance = torch.randn(3, 9), torch.rand(3)
    together = ops.cfg_combine_step(x, v, u, guidance, table, last, m0, m1)
    for i in range(3):
        parts = [t[i : i + 1] for t in (x, v, u, guidance, table, last, m0, m1)]
        for whole, alone in zip(together, ops.cfg_combine_step(*parts), strict=True):
            assert torch.equal(whole[i : i + 1], alone)


def test_an_empty_batch(memory_bound_by: str) -> None:
    empty = torch.empty(0, 4)
    got = ops.cfg_combine_step(empty, empty, None, None, torch.empty(0, 9), *[empty] * 3)
    assert all(one.shape == empty.shape for one in got)


def test_wrong_shapes_are_errors(memory_bound_by: str) -> None:
    x = torch.randn(2, 3)
    table = torch.randn(2, 9)
    for given, message in (
        ((x, x, None, None, table[:, :8], x, x, x), "table"),
        ((x, x, None, None, table, x[:1], x, x), "solver state"),
        ((x, x, None, None, table, x, x.double(), x), "solver state"),
        ((x, x[:, :2], None, None, table, x, x, x), "velocity"),
        ((x, x, x, None, table, x, x, x), "come together"),
        ((x, x, x, torch.ones(3), table, x, x, x), "guidance"),
    ):
        with pytest.raises(AssertionError, match=message):
            ops.cfg_combine_step(*given)  # type: ignore[arg-type]
