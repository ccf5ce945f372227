"""Every implementation of attention that runs here against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.ops import library
from tests.refs.attention import attention as reference
from tests.refs.attention import attention_merge as reference_merge

# batch, queries, keys, heads, head dim
SHAPES = [
    (1, 1, 1, 1, 8),
    (5, 123, 37, 2, 40),
    (2, 65, 512, 3, 64),
    (1, 100, 257, 2, 96),
    (1, 300, 300, 2, 128),
    (2, 7, 600, 1, 72),
    (1, 33, 31, 1, 256),
    # Several blocks of keys for every kernel, with one and with more strips of queries.
    (1, 20, 2100, 1, 64),
    (1, 70, 2100, 1, 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

Inputs = tuple[Tensor, Tensor, Tensor]


def _draw(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    b, s, length, h, d = shape
    torch.manual_seed(sum(shape))
    sizes = [(b, s, h, d), (b, length, h, d), (b, length, h, d)]
    q, k, v = (torch.randn(size).to(dtype) for size in sizes)
    return q, k, v


def _check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=LIMITS[got.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_log_sum_exp(attention_by: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        q, k, v = _draw(shape, dtype)
        for scale in (None, 0.3, -0.3, 0.0):
            want, sums = reference(q, k, v, scale=scale)
            out, lse = ops.attention(q, k, v, scale=scale, lse=True)
            assert out.dtype == dtype and lse.dtype == torch.float32
            _check(out, want)
            torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=2e-5)
            assert torch.equal(ops.attention(q, k, v, scale=scale), out)
    assert ops.counts() == {("attention", attention_by): 8 * len(SHAPES)}


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_is_not_above_that_of_torch(
    attention_by: str, dtype: torch.dtype, head_dim: int, scale: float | None
) -> None:
    """Flat and peaked softmax, against what scaled_dot_product_attention makes of the same."""
    q, k, v = _draw((1, 400, 1000, 2, head_dim), dtype)
    want, _ = reference(q, k, v, scale=scale)
    peer = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale
    ).transpose(1, 2)
    ours, theirs = (
        (x.double() - want).norm().item() for x in (ops.attention(q, k, v, scale=scale), peer)
    )
    assert ours <= 1.1 * theirs


def test_strided_inputs(attention_by: str) -> None:
    """Views of one fused output, of one with the heads first, and a head dim that is not dense."""
    torch.manual_seed(0)
    fused = torch.randn(2, 45, 3, 4, 64, dtype=torch.bfloat16)
    heads_first = (torch.randn(2, 3, n, 64).transpose(1, 2) for n in (45, 50, 50))
    sparse = (torch.randn(1, 9, 2, 128)[..., ::2] for _ in range(3))
    for q, k, v in (fused.unbind(2), heads_first, sparse):
        _check(ops.attention(q, k, v), reference(q, k, v)[0])
    one = torch.randn(1, 9, 2, 64)
    many = one.expand(3, 9, 2, 64)
    _check(ops.attention(many, many, many), reference(one, one, one)[0].expand(3, 9, 2, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(attention_by: str, dtype: torch.dtype) -> None:
    """Lengths of 0, 1 and more than a block; queries without keys give zeros and -inf."""
    torch.manual_seed(0)
    queries, keys = (3, 0, 130, 1, 5, 260), (7, 4, 1, 600, 0, 33)
    q = torch.randn(sum(queries), 2, 64).to(dtype)
    k, v = torch.randn(2, sum(keys), 2, 64).to(dtype)
    ends_q, ends_k = (torch.tensor((0, *n)).cumsum(0) for n in (queries, keys))
    out, lse = ops.attention(q, k, v, lse=True, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k.int())
    assert lse.shape == (2, sum(queries))
    for i, keys_here in enumerate(keys):
        a, b = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        if keys_here:
            want, sums = reference(q[None, a], k[None, b], v[None, b])
            _check(out[a], want[0])
            torch.testing.assert_close(lse[:, a].double(), sums[0], rtol=1e-5, atol=2e-5)
        else:
            assert not out[a].any() and torch.isneginf(lse[:, a]).all()


def test_empty(attention_by: str) -> None:
    for shape in ((0, 5, 5, 2, 64), (2, 0, 5, 2, 64), (2, 5, 5, 0, 64)):
        q, k, v = _draw(shape, torch.bfloat16)
        out, lse = ops.attention(q, k, v, lse=True)
        assert out.shape == q.shape and lse.shape == (shape[0], shape[3], shape[1])
    q, k, v = _draw((2, 70, 0, 2, 64), torch.bfloat16)
    out, lse = ops.attention(q, k, v, lse=True)
    assert not out.any() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(attention_by: str, dtype: torch.dtype) -> None:
    """Rising scores move the running maximum in every block of keys; far ones vanish."""
    q = torch.ones(1, 70, 1, 64, dtype=dtype)
    # In steps of 1/32, so that fp32 scores are exact.
    steps = (torch.linspace(-50, 50, 2500) * 32).round() / 32
    rising = steps.to(dtype)[None, :, None, None].expand(1, 2500, 1, 64)
    v = torch.randn(1, 2500, 1, 64).to(dtype)
    for k in (rising, -rising):
        want, sums = reference(q, k, v, scale=1.0)
        out, lse = ops.attention(q, k, v, scale=1.0, lse=True)
        # A score of 3200 in powers of 2 has a spacing of 5e-4.
        limit = max(LIMITS[dtype], 1e-4)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=limit)
        torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-3)


def test_nan_and_infinity_stay_in_their_row(attention_by: str) -> None:
    q, k, v = _draw((1, 40, 50, 1, 64), torch.bfloat16)
    clean = ops.attention(q, k, v)
    q[0, 3], q[0, 35] = float("nan"), float("inf")
    got = ops.attention(q, k, v)
    rows = [i for i in range(40) if i not in (3, 35)]
    assert got[0, 3].isnan().all() and got[0, 35].isnan().all()
    assert torch.equal(got[0, rows], clean[0, rows])


def test_threads_do_not_change_a_bit(attention_by: str) -> None:
    q, k, v = _draw((2, 270, 300, 2, 64), torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.attention(q, k, v))
    finally:
        torch.set_num_threads(threads)
    if attention_by != "torch":
        assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_parts_equal_the_whole(attention_by: str, dtype: torch.dtype) -> None:
    for shape in ((2, 33, 90, 3, 40), (1, 1, 2, 1, 8)):
        q, k, v = _draw(shape, dtype)
        cut = shape[2] // 3
        parts = [
            ops.attention(q, k[:, a:b], v[:, a:b], lse=True)
            for a, b in ((0, cut), (cut, None), (0, 0))
        ]
        out, lse = ops.attention_merge(*parts[0], *parts[1])
        assert out.dtype == dtype
        _check(out, reference_merge(parts[:2])[0])
        want, sums = reference(q, k, v)
        _check(out, want)
        torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=2e-5)
        # A part over no keys changes nothing, on either side; two of them stay empty.
        for pair in ((parts[2], (out, lse)), ((out, lse), parts[2])):
            again = ops.attention_merge(*pair[0], *pair[1])
            assert torch.equal(again[0], out) and torch.equal(again[1], lse)
        none, logs = ops.attention_merge(*parts[2], *parts[2])
        assert not none.any() and torch.isneginf(logs).all()


def test_merge_into_fp32_and_packed(attention_by: str) -> None:
    a, b = torch.randn(6, 3, 8), torch.randn(6, 3, 8).bfloat16()
    x, y = torch.randn(2, 3, 6) * 5
    out, lse = ops.attention_merge(a, x, b, y)
    want, sums = reference_merge([(a, x), (b, y)])
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-6, atol=1e-6)


def test_a_wrong_shape_is_an_error(attention_by: str) -> None:
    q, k, v = _draw((2, 5, 7, 2, 8), torch.float32)
    for bad in (k[:1], k[:, :, :1], k[..., :4], k[0]):
        with pytest.raises(AssertionError, match=r"k \("):
            ops.attention(q, bad, v)
    with pytest.raises(AssertionError, match=r"v \("):
        ops.attention(q, k, v[:, :6])
    with pytest.raises(AssertionError, match="come together"):
        ops.attention(q, k, v, cu_seqlens_q=torch.tensor([0, 5]))
    for ends in ([0, 4], [0, 6, 5], [1, 5], []):
        with pytest.raises((AssertionError, ValueError), match="cu_seqlens"):
            cut = torch.tensor(ends, dtype=torch.int64)
            ops.attention(q[0], k[0], v[0], cu_seqlens_q=cut, cu_seqlens_k=cut)
    with pytest.raises(AssertionError, match="lse_b"):
        ops.attention_merge(q, torch.zeros(2, 2, 5), q, torch.zeros(2, 5, 2))


@pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")
def test_the_native_op_names_what_it_cannot_take() -> None:
    q, k, v = _draw((2, 5, 7, 2, 8), torch.float32)

    def call(*given: Tensor) -> None:
        torch.ops.sgld.attention(*given, 0.5, False, None, None)

    with pytest.raises(ValueError, match=r"k \[1, 7, 2, 8\] has size 1 in dimension 0 where B is"):
        call(q, k[:1], v)
    with pytest.raises(ValueError, match=r"v .* has size 6 in dimension 1 where L is 7"):
        call(q, k, v[:, :6])
    with pytest.raises(ValueError, match="k has another dtype than q"):
        call(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="head dim 4 is not a multiple of 8"):
        call(q[..., :4], k[..., :4], v[..., :4])
    with pytest.raises(ConfigError, match="head dim 4"), ops.using(attention="cpu"):
        ops.attention(q[..., :4], k[..., :4], v[..., :4])
    with pytest.raises(ValueError, match=r"lse_b \[2, 2, 4\] has size 4 .* where S is 5"):
        lse = torch.zeros(2, 2, 5)
        torch.ops.sgld.attention_merge(q, lse, q, lse[..., :4])


@pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")
def test_torch_accepts_the_native_ops() -> None:
    q, k, v = _draw((2, 5, 7, 2, 8), torch.bfloat16)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ends = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 7], dtype=torch.int32)
    for given in ((q, k, v, 0.5, True, None, None), (q[0], k[0], v[0], 0.5, False, *ends)):
        torch.library.opcheck(torch.ops.sgld.attention.default, given, test_utils=checks)
    out, lse = ops.attention(q, k, v, lse=True)
    merge = torch.ops.sgld.attention_merge.default
    torch.library.opcheck(merge, (out, lse, out, lse), test_utils=checks)
    compiled = torch.compile(
        lambda q, k, v: ops.attention(q * 2, k, v) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), ops.attention(q * 2, k, v) + 1)
