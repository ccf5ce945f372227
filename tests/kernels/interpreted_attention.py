"""Values of the Triton attention; `test_attention.py` runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion.kernels.attention import attention_launch, attention_merge_launch
from sgl_diffusion.kernels.settings import AttentionBlocks
from tests.kernels import interpreter
from tests.refs.triton_attention import attention as reference

assert interpreter, "run this file with TRITON_INTERPRET=1"

LIMIT = {torch.float32: 2e-5, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=str)
POINTERS, TMA = AttentionBlocks(32, 16, 4, 2), AttentionBlocks(32, 16, 4, 2, tma=True)
BLOCKS = pytest.mark.parametrize("blocks", [POINTERS, TMA], ids=["pointers", "tma"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(6)


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=LIMIT[dtype], atol=LIMIT[dtype])


@BLOCKS
@DTYPES
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "dim"),
    [
        (1, 1, 1, 1, 64),
        (2, 33, 33, 3, 64),
        (1, 32, 48, 2, 128),
        (1, 5, 77, 2, 128),
        (2, 70, 15, 1, 64),
        (1, 0, 9, 2, 64),
        (1, 9, 0, 2, 64),
    ],
)
def test_values(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    blocks: AttentionBlocks,
) -> None:
    q = (torch.randn(batch, queries, heads, dim) * 2).to(dtype)
    k, v = torch.randn(2, batch, keys, heads, dim).to(dtype)
    close(attention_launch(q, k, v, 0.2, blocks=blocks), reference(q, k, v, 0.2), dtype)


@BLOCKS
def test_a_fused_projection_is_read_where_it_is(blocks: AttentionBlocks) -> None:
    q, k, v = torch.randn(2, 40, 3, 2, 64).half().unbind(2)
    got = attention_launch(q, k, v, blocks=blocks)
    close(got, reference(q, k, v, 64**-0.5), torch.float16)


@BLOCKS
def test_large_scores_stay_finite(blocks: AttentionBlocks) -> None:
    q, k, v = torch.randn(3, 1, 40, 1, 64).float().unbind()
    q, k = q * 30, k * 30
    close(attention_launch(q, k, v, blocks=blocks), reference(q, k, v, 0.125), torch.float32)


@BLOCKS
def test_packed_sequences(blocks: AttentionBlocks) -> None:
    queries, keys = [3, 0, 40, 1], [20, 7, 16, 0]
    q = torch.randn(1, sum(queries), 2, 64)
    k, v = torch.randn(2, 1, sum(keys), 2, 64)
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32)
        for n in (queries, keys)
    )
    out, lse = attention_launch(q, k, v, None, cu_q, cu_k, max(queries), blocks=blocks)
    for i in range(len(queries)):
        a, b = cu_q[i], cu_q[i + 1]
        part = slice(cu_k[i], cu_k[i + 1])
        want = reference(q[:, a:b], k[:, part], v[:, part], 64**-0.5)
        close((out[:, a:b], lse[:, :, a:b]), want, torch.float32)


@DTYPES
def test_merge_of_two_halves_of_the_keys(dtype: torch.dtype) -> None:
    q = torch.randn(2, 9, 3, 64).to(dtype)
    k, v = torch.randn(2, 2, 50, 3, 64).to(dtype)
    parts = [
        attention_launch(q, k[:, part], v[:, part], 0.3, blocks=POINTERS)
        for part in (slice(0, 17), slice(17, 50))
    ]
    got = attention_merge_launch(*parts[0], *parts[1])
    close(got, reference(q, k, v, 0.3), dtype)


def test_merge_with_no_keys() -> None:
    q = torch.randn(1, 4, 2, 40)
    some = (q, torch.randn(1, 2, 4))
    none = (torch.zeros_like(q), torch.full((1, 2, 4), float("-inf")))
    close(attention_merge_launch(*some, *none), tuple(x.double() for x in some), torch.float32)
    close(attention_merge_launch(*none, *none), tuple(x.double() for x in none), torch.float32)


def test_wrong_calls_are_errors() -> None:
    q = torch.randn(1, 4, 2, 40)
    with pytest.raises(AssertionError, match="head dim 40"):
        attention_launch(q, q, q)
    q = torch.randn(1, 4, 2, 64)
    with pytest.raises(AssertionError, match="come together"):
        attention_launch(q, q, q, cu_seqlens_q=torch.zeros(2, dtype=torch.int32))
