"""Values of the Triton LoRA kernels; `test_lora.py` runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.kernels import lora
from sgl_diffusion.kernels.lora import lora_merge_launch, lora_unmerge_launch
from sgl_diffusion.kernels.lora_apply import lora_apply_launch
from sgl_diffusion.kernels.settings import escape_room
from sgl_diffusion.ops import lora_truth
from tests.kernels import interpreter

assert interpreter, "run this file with TRITON_INTERPRET=1"

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
SHAPES = [(1, 1), (130, 257), (64, 40), (5, 123), (256, 128)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def adapters(
    shapes: list[tuple[int, int]], ranks: list[int], size: float, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    a = [torch.randn(r, n).to(dtype) for (_, n), r in zip(shapes, ranks, strict=True)]
    b = [
        (torch.randn(m, r) * size * 0.02 / r**0.5).to(dtype)
        for (m, _), r in zip(shapes, ranks, strict=True)
    ]
    return a, b


def matrices(dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(shape) * 0.02).to(dtype) for shape in SHAPES]


@DTYPES
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_merge_and_unmerge(rank: int, dtype: torch.dtype) -> None:
    weights = matrices(dtype)
    before = [w.clone() for w in weights]
    a, b = adapters(SHAPES, [rank] * len(SHAPES), 0.3, dtype)
    scales = [0.5 + 0.25 * i for i in range(len(SHAPES))]
    codes = lora_merge_launch(weights, a, b, scales)
    assert codes is not None and codes.failed() == []
    for w, old, up, down, scale in zip(weights, before, b, a, scales, strict=True):
        want = old.double() + scale * (up.double() @ down.double())
        torch.testing.assert_close(w.double(), want, rtol=2.0**-10, atol=1e-4 * 2.0**-3)
        assert not torch.equal(w, old)
    lora_unmerge_launch(weights, a, b, scales, codes)
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w, old)


@DTYPES
def test_several_adapters_are_added_before_the_one_rounding(dtype: torch.dtype) -> None:
    w = (torch.randn(70, 48) * 0.02).to(dtype)
    before = w.clone()
    a, b = adapters([(70, 48)] * 3, [4, 16, 33], 0.3, torch.float32)
    scales, owners = [1.0, -0.5, 2.0], [0, 0, 0]
    codes = lora_merge_launch([w], a, b, scales, owners)
    assert codes is not None and codes.failed() == []
    want = before.double()
    for up, down, scale in zip(b, a, scales, strict=True):
        want = want + scale * (up.double() @ down.double())
    limit = {torch.float32: 1e-6, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(w.double(), want, rtol=limit, atol=limit * 0.02)
    lora_unmerge_launch([w], a, b, scales, codes, owners)
    assert torch.equal(w, before)


def test_cycles_with_different_adapters_and_strided_weights() -> None:
    whole = (torch.randn(96, 200) * 0.02).half()
    weights = [whole[:, :64], whole[:, 72:]]
    shapes = [(96, 64), (96, 128)]
    before = whole.clone()
    for cycle in range(5):
        a, b = adapters(shapes, [8, 16], 0.1 * (cycle + 1), torch.float16)
        codes = lora_merge_launch(weights, a, b, [1.0, -1.0])
        assert codes is not None and codes.failed() == []
        lora_unmerge_launch(weights, a, b, [1.0, -1.0], codes)
        assert torch.equal(whole, before)


def test_escapes_keep_what_no_code_holds() -> None:
    """Weights far smaller than the delta, zeros of both signs, infinity and NaN."""
    w = (torch.randn(128, 128) * 0.02).half()
    flat = w.view(-1)
    flat[:9] = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 6e-8, -6e-8, 65504.0, -65504.0]
    ).half()
    before = w.clone().view(torch.int16)
    a, b = adapters([(128, 128)], [16], 0.3, torch.float16)
    codes = lora_merge_launch([w], a, b, [1.0])
    assert codes is not None and codes.failed() == []
    assert 0 < int(codes.escapes[0]) < escape_room(w.numel())
    assert codes.bits_per_weight([w]) < 5.5
    lora_unmerge_launch([w], a, b, [1.0], codes)
    assert torch.equal(w.view(torch.int16), before)


def test_a_matrix_without_room_is_reported_and_can_be_taken_back() -> None:
    weights = [torch.randn(300, 200).half() * 1e-4, torch.randn(64, 64).half()]
    before = [w.clone() for w in weights]
    a, b = adapters([(300, 200), (64, 64)], [16, 16], 10.0, torch.float16)
    codes = lora_merge_launch(weights, a, b, [1.0, 0.01])
    assert codes is not None and codes.failed() == [0]
    lora_unmerge_launch(weights, a, b, [1.0, 0.01], codes)
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w, old)


def test_adapters_of_row_segments() -> None:
    """q, k and v of a fused weight have adapters of their own; one is left out, two overlap."""
    w = (torch.randn(150, 40) * 0.02).half()
    before = w.clone()
    shapes, starts, owners = [(50, 40), (50, 40), (90, 40)], [0, 100, 60], [0, 0, 0]
    a, b = adapters(shapes, [4, 16, 8], 0.2, torch.float16)
    codes = lora_merge_launch([w], a, b, [1.0, 1.0, 1.0], owners, starts)
    want = before.double()
    for down, up, start in zip(a, b, starts, strict=True):
        want[start : start + len(up)] += up.double() @ down.double()
    torch.testing.assert_close(w.double(), want, rtol=2.0**-11, atol=2.0**-17)
    assert torch.equal(w[50:60], before[50:60])
    lora_unmerge_launch([w], a, b, [1.0, 1.0, 1.0], codes, owners, starts)
    assert torch.equal(w, before)


def test_without_codes_nothing_is_kept() -> None:
    w = torch.randn(40, 24)
    want = w.double()
    a, b = adapters([(40, 24)], [5], 1.0, torch.float32)
    assert lora_merge_launch([w], a, b, [2.0], keep=False) is None
    torch.testing.assert_close(w.double(), want + 2 * b[0].double() @ a[0].double())


def test_empty_and_wrong_calls() -> None:
    empty = torch.empty(0, 8)
    assert lora_merge_launch([empty], [torch.ones(2, 8)], [torch.ones(0, 2)], [1.0]) is None
    with pytest.raises(AssertionError, match=r"weight 0 \(4, 8\), a \(2, 7\)"):
        lora_merge_launch([torch.ones(4, 8)], [torch.ones(2, 7)], [torch.ones(4, 2)], [1.0])
    assert lora._KINDS


@DTYPES
@pytest.mark.parametrize(("tokens", "width", "out"), [(1, 1, 1), (77, 123, 40), (64, 256, 130)])
def test_apply_by_token(tokens: int, width: int, out: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(tokens, width).to(dtype), torch.randn(tokens, out).to(dtype)
    a = (torch.randn(3, 24, width) / width**0.5).to(dtype)
    b = (torch.randn(3, out, 24) / 24**0.5).to(dtype)
    scales = torch.tensor([1.0, -2.0, 0.5])
    index = torch.randint(-1, 3, (tokens,), dtype=torch.int32)
    want = y.double()
    for n in range(3):
        part = scales[n] * (x.double() @ a[n].double().T) @ b[n].double().T
        want = want + torch.where((index == n)[:, None], part, 0.0)
    lora_apply_launch(y, x, a, b, scales, index)
    limit = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(y.double(), want, rtol=limit, atol=limit)


@DTYPES
@pytest.mark.parametrize("by_row", [True, False])
def test_the_op_applies_segments_of_several_adapters(dtype: torch.dtype, by_row: bool) -> None:
    def delta(rank: int, rows: int, scale: float, start: int) -> ops.LoraDelta:
        down, up = torch.randn(rank, 40) / 40**0.5, torch.randn(rows, rank) / rank**0.5
        return ops.LoraDelta(down.to(dtype), up.to(dtype), scale, start)

    adapters = [
        [delta(4, 20, 1.0, 0), delta(4, 20, -2.0, 20), delta(2, 20, 0.5, 20)],
        [delta(9, 60, 0.7, 0)],
        [],
    ]
    x, y = torch.randn(2, 9, 40).to(dtype), torch.randn(2, 9, 60).to(dtype)
    index = torch.randint(-1, 3, (2, 9)) if by_row else None
    kept = y.clone()
    with ops.using(lora_apply="triton"):
        got = ops.lora_apply(x, y, adapters, index)
    assert torch.equal(y, kept) and got.dtype == dtype
    limit = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    want = lora_truth.apply(x.double().float(), y.float(), adapters, index)
    torch.testing.assert_close(got.double(), want.double(), rtol=limit, atol=limit)


@DTYPES
@pytest.mark.parametrize("rank", [16, 200])
def test_a_stack_of_adapters(rank: int, dtype: torch.dtype) -> None:
    """Upper factors in fp32, ranks of more than one launch, segments that overlap."""
    first = ops.LoraPart(
        (torch.randn(2, rank, 40) / 40**0.5).to(dtype), torch.randn(2, 60, rank) / rank**0.5
    )
    second = ops.LoraPart((torch.randn(2, 4, 40) / 40**0.5).to(dtype), torch.randn(2, 20, 4), 30)
    stack = ops.LoraStack([first, second])
    x, y = torch.randn(2, 9, 40).to(dtype), torch.randn(2, 9, 60).to(dtype)
    index = torch.randint(-1, 2, (2, 9), dtype=torch.int32)
    limit = {torch.float32: 2e-5, torch.float16: 4e-3}[dtype]
    for _ in range(2):
        with ops.using(lora_apply="triton"):
            got = ops.lora_apply(x, y, stack, index)
        want = lora_truth.apply(x.float(), y.float(), stack, index)
        torch.testing.assert_close(got.float(), want, rtol=limit, atol=limit)
        first.up.mul_(-0.5)
    with ops.using(lora_apply="triton"), pytest.raises(ConfigError, match="float64"):
        double = ops.LoraStack([ops.LoraPart(first.down, first.up.double())])
        ops.lora_apply(x, y, double, index)
