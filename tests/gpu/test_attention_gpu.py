"""Attention on a GPU against float64, by every implementation that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgl_diffusion.ops import cuda_attention, library, triton_attention
from tests.gpu.common import DTYPES, close, fresh, relative
from tests.refs.triton_attention import attention as reference

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 1, 1, 1),
    (2, 130, 77, 3),
    (1, 128, 256, 2),
    (1, 1025, 4173, 2),
    (2, 300, 1, 1),
    (1, 9, 0, 2),
]
ATTENTION: dict[str, Callable[..., Any]] = {
    "cuda": cuda_attention.attention,
    "triton": triton_attention.attention,
}


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    assert not library.without_cuda(), library.without_cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ATTENTION)
def test_attention(
    implementation: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype
) -> None:
    batch, queries, keys, heads = shape
    q = fresh(batch, queries, heads, dim, dtype=dtype, size=2)
    k, v = fresh(2, batch, keys, heads, dim, dtype=dtype)
    if implementation == "cuda" and cuda_attention.refuses(q, k, v):
        pytest.skip(cuda_attention.refuses(q, k, v))
    out, lse = ATTENTION[implementation](q, k, v, 0.2)
    want, want_lse = reference(q, k, v, 0.2)
    close(lse, want_lse, steps=2.0**9)
    if keys:
        peer = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), scale=0.2
        ).transpose(1, 2)
        assert relative(out, want) <= max(1.1 * relative(peer, want), 2.0**-8)
    else:
        assert torch.all(out == 0)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("implementation", ATTENTION)
def test_a_fused_projection_is_read_where_it_is(implementation: str, dim: int) -> None:
    q, k, v = fresh(2, 333, 3, 4, dim).unbind(2)
    out, _ = ATTENTION[implementation](q, k, v)
    assert relative(out, reference(q, k, v, dim**-0.5)[0]) < 2.0**-7


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("implementation", ATTENTION)
def test_packed_sequences(implementation: str, dim: int) -> None:
    queries, keys = [3, 0, 400, 128], [200, 7, 513, 0]
    q = fresh(1, sum(queries), 2, dim)
    k, v = fresh(2, 1, sum(keys), 2, dim)
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        for n in (queries, keys)
    )
    out, lse = ATTENTION[implementation](q, k, v, None, cu_q, cu_k, max(queries))
    for i, count in enumerate(queries):
        if count == 0:
            continue
        at, part = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        want, want_lse = reference(q[:, at], k[:, part], v[:, part], dim**-0.5)
        close(out[:, at], want, steps=4)
        close(lse[:, :, at], want_lse, steps=2.0**9)


def test_merge_of_two_halves_of_the_keys() -> None:
    q = fresh(2, 130, 3, 128)
    k, v = fresh(2, 2, 500, 3, 128)
    parts = [
        triton_attention.attention(q, k[:, part], v[:, part])
        for part in (slice(0, 170), slice(170, 500))
    ]
    out, lse = triton_attention.attention_merge(*parts[0], *parts[1])
    want, want_lse = reference(q, k, v, 128**-0.5)
    assert relative(out, want) < 2.0**-7
    close(lse, want_lse, steps=2.0**9)
