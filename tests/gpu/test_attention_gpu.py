"""Attention on a GPU against float64, by every implementation that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.attention import select
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
    (3, 700, 177, 5),
    (1, 4096, 1024, 2),
]
ATTENTION: dict[str, Callable[..., Any]] = {
    "cuda": cuda_attention.attention,
    "cuda_sm90": cuda_attention.attention_sm90,
    "triton": triton_attention.attention,
}


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    assert not library.without_cuda(), library.without_cuda()


@pytest.fixture(params=ATTENTION)
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda_sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for sm_90 only")
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
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
def test_a_fused_projection_is_read_where_it_is(implementation: str, dim: int) -> None:
    q, k, v = fresh(2, 333, 3, 4, dim).unbind(2)
    out, _ = ATTENTION[implementation](q, k, v)
    assert relative(out, reference(q, k, v, dim**-0.5)[0]) < 2.0**-7


@pytest.mark.parametrize("dim", [64, 128])
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


@pytest.mark.parametrize("dim", [64, 128])
def test_a_packed_sequence_does_not_know_its_neighbours(implementation: str, dim: int) -> None:
    """Not even where they are no numbers; keys end inside of a tile, and just at one."""
    queries, keys = [130, 64, 200], [130, 40, 352]
    q = fresh(1, sum(queries), 2, dim)
    k, v = fresh(2, 1, sum(keys), 2, dim)
    k[:, 130:170], v[:, 130:170] = float("nan"), float("inf")
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        for n in (queries, keys)
    )
    out, lse = ATTENTION[implementation](q, k, v, None, cu_q, cu_k, max(queries))
    for at, part in ((slice(0, 130), slice(0, 130)), (slice(194, 394), slice(170, 522))):
        want, want_lse = reference(q[:, at], k[:, part], v[:, part], dim**-0.5)
        close(out[:, at], want, steps=4)
        close(lse[:, :, at], want_lse, steps=2.0**9)


def test_the_same_bits_every_time(implementation: str) -> None:
    """A race between copies and products would show as a result that moves."""
    q, k, v = fresh(3, 2, 1500, 7, 128)
    first = ATTENTION[implementation](q, k, v)
    for _ in range(20):
        again = ATTENTION[implementation](q, k, v)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("name", ["native", "triton"])
def test_backends_by_name(name: str) -> None:
    q, k, v = fresh(3, 1, 333, 2, 64)
    backend = select(name, device=q.device, head_dim=64, dtype=q.dtype, needs_lse=True)
    ops.reset_counts()
    out, lse = backend.forward_lse(q, k, v)
    want, want_lse = reference(q, k, v, 64**-0.5)
    close(out, want, steps=4)
    close(lse, want_lse, steps=2.0**9)
    rows = {"triton": {"triton"}, "native": {"cuda", "cuda_sm90"}}[name]
    assert sum(ops.counts().get(("attention", row), 0) for row in rows) == 1


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
