"""lora_apply on every implementation that runs here against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.ops import LoraDelta, LoraPart, LoraStack, library
from tests.isa import at_level
from tests.refs.lora import lora_apply as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LEVELS = ("torch", "cpu-amx_bf16", "cpu-avx512_bf16", "cpu-avx512", "cpu-avx2", "cpu-scalar")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, isa = request.param.partition("-")
    capped = at_level(isa) if isa else nullcontext()
    with capped, ops.using(lora_apply=name):
        ops.reset_counts()
        yield name


def _adapters(width: int, out: int, dtype: torch.dtype) -> list[list[LoraDelta]]:
    """One for all rows of out, one for two segments with ranks of their own, one for a segment."""

    def delta(rank: int, rows: int, scale: float, start: int = 0) -> LoraDelta:
        down = torch.randn(rank, width) / width**0.5
        return LoraDelta(down.to(dtype), torch.randn(rows, rank).to(dtype), scale, start)

    third = out // 3
    return [
        [delta(4, out, 0.7)],
        [delta(7, third, -1.5), delta(33, out - 2 * third, 0.25, 2 * third)],
        [delta(1, third, 1.0, third)],
    ]


def _check(got: Tensor, want: Tensor) -> None:
    limit = LIMITS[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=4 * limit)


@pytest.mark.parametrize("factor", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_per_row(level: str, dtype: torch.dtype, factor: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [
        ((1, 1), 5, 7),
        ((3, 41), 40, 123),
        ((130,), 129, 64),
        ((2, 3, 5), 33, 96),
        ((1, 6), 9, 12),
    ]
    for lead, width, out in shapes:
        x, y = torch.randn(*lead, width).to(dtype), torch.randn(*lead, out).to(dtype)
        adapters = _adapters(width, out, factor)
        before = y.clone()
        for index in (
            torch.randint(-1, 3, lead),
            torch.randint(-1, 3, lead, dtype=torch.int32),
            torch.randint(-1, 3, lead[:1]),
            torch.full(lead, -1),
        ):
            got = ops.lora_apply(x, y, adapters, index)
            assert got.dtype == dtype and torch.equal(y, before)
            _check(got, reference(x, y, adapters, index))
    assert set(ops.counts()) == {("lora_apply", level)}


def test_all_adapters_on_all_rows(level: str) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(2, 77, 64).bfloat16(), torch.randn(2, 77, 90).bfloat16()
    adapters = _adapters(64, 90, torch.bfloat16)
    _check(ops.lora_apply(x, y, adapters), reference(x, y, adapters))
    assert torch.equal(ops.lora_apply(x, y, []), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stack_is_what_is_written_into_it(level: str, dtype: torch.dtype) -> None:
    """Strengths are in the upper factors, which are fp32; ranks that are not used are zeros."""
    torch.manual_seed(4)
    x, y = torch.randn(3, 11, 40).to(dtype), torch.randn(3, 11, 60).to(dtype)
    whole = LoraPart(torch.zeros(2, 16, 40, dtype=dtype), torch.zeros(2, 60, 16))
    third = LoraPart(torch.zeros(2, 16, 40, dtype=dtype), torch.zeros(2, 20, 16), 20)
    stack, index = LoraStack([whole, third]), torch.tensor([1, -1, 0], dtype=torch.int32)
    assert torch.equal(ops.lora_apply(x, y, stack, index), y)
    for scale in (0.5, -2.0):
        adapters = [
            [LoraDelta(torch.randn(4, 40).to(dtype) / 6, torch.randn(60, 4), scale)],
            [LoraDelta(torch.randn(9, 40).to(dtype) / 6, torch.randn(20, 9), scale, 20)],
        ]
        for number, ((delta,), part) in enumerate(zip(adapters, (whole, third), strict=True)):
            rank = delta.down.shape[0]
            part.down[number, :rank] = delta.down
            part.up[number, :, :rank] = delta.up * scale
        _check(ops.lora_apply(x, y, stack, index), reference(x, y, adapters, index))
        assert len(stack) == 2 and stack[1][1].start == 20 and len(stack[:1]) == 1


def test_rows_without_an_adapter_keep_their_bits(level: str) -> None:
    x, y = torch.randn(6, 32), torch.randn(6, 48)
    x[2], y[2, 0], y[4, 1] = float("nan"), float("inf"), -0.0
    index = torch.tensor([0, 1, -1, 2, -1, 0])
    got = ops.lora_apply(x, y, _adapters(32, 48, torch.float32), index)
    assert torch.equal(got[[2, 4]].view(torch.int32), y[[2, 4]].view(torch.int32))
    assert got.isfinite()[[0, 1, 3, 5]].all()


def test_strided_and_empty(level: str) -> None:
    torch.manual_seed(2)
    fused = torch.randn(4, 9, 3 * 40).bfloat16()
    x, y = fused[..., 40:80], torch.randn(4, 60, 9).bfloat16().transpose(1, 2)
    adapters = [
        [replace(d, down=d.down.T.contiguous().T)] for (d, *_) in _adapters(40, 60, x.dtype)
    ]
    index = torch.tensor([2, 0, -1, 1])
    _check(ops.lora_apply(x, y, adapters, index), reference(x, y, adapters, index))
    nothing = torch.zeros(0, 5, 40), torch.zeros(0, 5, 60)
    assert ops.lora_apply(*nothing, adapters, torch.zeros(0, dtype=torch.int64)).shape == (0, 5, 60)


def test_a_row_does_not_depend_on_its_batch(level: str) -> None:
    """Nor on the number of threads: a request gets the same bits alone and in company."""
    if level == "torch":
        pytest.skip("torch's matrix product depends on the number of rows")
    torch.manual_seed(3)
    x, y = torch.randn(300, 96).bfloat16(), torch.randn(300, 120).bfloat16()
    adapters, index = _adapters(96, 120, torch.bfloat16), torch.randint(-1, 3, (300,))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.lora_apply(x, y, adapters, index))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for row in (0, 7, 299):
        alone = slice(row, row + 1)
        got = ops.lora_apply(x[alone], y[alone], adapters, index[alone])
        assert torch.equal(got, results[0][alone])


def test_wrong_shapes_are_errors(level: str) -> None:
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 12)
    (delta,) = _adapters(8, 12, torch.float32)[0]
    for adapters, index, words in (
        ([[replace(delta, down=torch.randn(4, 7))]], None, "rank, in of x"),
        ([[replace(delta, up=torch.randn(12, 5))]], None, "rank of down"),
        ([[replace(delta, start=1)]], None, "within out of y"),
        ([[delta]], torch.zeros(3), "index"),
    ):
        with pytest.raises(AssertionError, match=words):
            ops.lora_apply(x, y, adapters, index)
    with pytest.raises(AssertionError, match="differ"):
        ops.lora_apply(x, y[:1], [[delta]])


@pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")
def test_torch_accepts_the_native_op() -> None:
    """Schema, fake implementation and tracing agree with what the op does."""
    x, y = torch.randn(5, 8), torch.randn(5, 12)
    (delta,) = _adapters(8, 12, torch.float32)[0]
    factors = ([delta.down], [delta.up], [0.5], [0], [1])
    for index in (torch.tensor([0, -1, 0, 0, -1]), None):
        torch.library.opcheck(
            torch.ops.sgld.lora_apply_.default,
            (x, y, index, *factors),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    with pytest.raises(ValueError, match="index 1 is none of the 1 adapters"):
        torch.ops.sgld.lora_apply_(x, y, torch.ones(5, dtype=torch.int64), *factors)
    weight = torch.randn(12, 8)
    torch.library.opcheck(
        torch.ops.sgld.lora_merge_.default, ([weight], *factors), test_utils=("test_schema",)
    )


def test_it_is_traced_as_one_graph(level: str) -> None:
    x, y, index = torch.randn(6, 8), torch.randn(6, 12), torch.tensor([0, 1, 2, -1, 1, 0])
    adapters = _adapters(8, 12, torch.float32)

    def step(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return ops.lora_apply(x.sin(), y, adapters, index).cos()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, index), step(x, y, index))


def test_a_merge_and_its_end_work_within_a_compiled_function(level: str) -> None:
    """The length of a record depends on the weights, so the graph breaks around both."""
    (delta,) = _adapters(32, 48, torch.bfloat16)[0][:1]
    weight, x = torch.randn(48, 32).bfloat16(), torch.randn(4, 32).bfloat16()

    def around(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        (record,) = ops.lora_merge_([weight], [[delta]])
        merged = x @ weight.T
        ops.lora_unmerge_([weight], [record])
        return merged, x @ weight.T

    base = weight.clone()
    name = "torch" if level == "torch" else "cpu"
    with ops.using(lora_merge_=name, lora_unmerge_=name), torch.inference_mode():
        want = around(weight, x)
        torch._dynamo.reset()
        got = torch.compile(around, backend="aot_eager")(weight, x)
    assert torch.equal(weight, base) and not torch.equal(want[0], want[1])
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
