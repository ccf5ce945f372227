"""Merging and unmerging LoRA on every implementation that runs here: values, exactness, bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.errors import EngineError
from sgl_diffusion.ops import LoraDelta, LoraRecord, library
from tests.isa import at_level
from tests.refs.lora import lora_merge_ as reference
from tests.refs.lora import random_weight
from tests.refs.norm_modulate import rounding_error

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1, 1), (7, 5, 3), (100, 333, 16), (48, 128, 32), (97, 140, 75)]
LEVELS = ("torch", "cpu-avx512_bf16", "cpu-avx512", "cpu-avx2", "cpu-scalar", "cuda")


@contextmanager
def computing(level: str) -> Iterator[None]:
    """One implementation, the CPU level capped; skips where this machine has no such level."""
    name, _, isa = level.partition("-")
    if name == "cuda" and library.without_cuda():
        pytest.skip(library.without_cuda())
    capped = at_level(isa) if isa else nullcontext()
    with capped, ops.using(lora_merge_=name, lora_unmerge_=name):
        yield


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with computing(request.param):
        yield request.param


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bytes: NaN equals itself, and zero is not negative zero."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _same_records(a: LoraRecord, b: LoraRecord) -> bool:
    parts = ((a.codes, b.codes), (a.escapes, b.escapes), (a.ends, b.ends))
    return a.checksum == b.checksum and all(
        x.shape == y.shape and (x.numel() == 0 or _same(x, y)) for x, y in parts
    )


def _set(shape: tuple[int, int, int], dtype: torch.dtype, factor: torch.dtype) -> tuple:
    """A weight with every odd value there is, and two adapters, one of them on a few rows."""
    torch.manual_seed(sum(shape))
    out, width, rank = shape
    weight, delta = random_weight(out, width, rank, 0.1, dtype, factor)
    odd = torch.tensor([0.0, -0.0, 1e-39, -6e-8, float("nan"), -float("inf"), 60000.0]).to(dtype)
    flat = weight.view(-1)
    if flat.numel() > 100:
        flat[3 : 3 + len(odd)] = odd
        flat[-len(odd) :] = odd
    _, more = random_weight(out, width, 2 * rank, 0.1, dtype, factor)
    start = out // 3
    return weight, [delta, LoraDelta(more.down, more.up[start : out - start], -0.7, start)]


@pytest.mark.parametrize("factor", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_restoring(level: str, dtype: torch.dtype, factor: torch.dtype) -> None:
    ops.reset_counts()
    for shape in SHAPES:
        base, deltas = _set(shape, dtype, factor)
        weight = base.clone()
        (record,) = ops.lora_merge_([weight], [deltas])
        finite = base.isfinite() & weight.isfinite()
        want = reference(base, deltas)
        limit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
        torch.testing.assert_close(
            weight.double()[finite], want[finite], rtol=limit, atol=limit * 2e-2
        )
        if dtype != torch.float32 and base.numel() > 1000:
            error, ideal = rounding_error(weight[finite], want[finite])
            assert error <= 1.001 * ideal, "the result was rounded more than once"
        assert base.numel() < 100 or not torch.equal(weight[finite], base[finite])
        ops.lora_unmerge_([weight], [record])
        assert _same(weight, base)
    name = level.partition("-")[0]
    assert set(ops.counts()) == {("lora_merge_", name), ("lora_unmerge_", name)}


@pytest.mark.parametrize("factor", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_gets_the_same_bits(dtype: torch.dtype, factor: torch.dtype) -> None:
    """Merged weights and records, so that each can undo what another one merged."""
    for shape in SHAPES:
        base, deltas = _set(shape, dtype, factor)
        merged, records = {}, {}
        levels = [name for name in LEVELS if _runs(name)]
        for name in levels:
            weight = base.clone()
            with computing(name):
                (records[name],) = ops.lora_merge_([weight], [deltas])
            merged[name] = weight
            # Which NaN a NaN is rounded to differs between torch's own kernels, too.
            assert _same(weight.nan_to_num(0.0), merged["torch"].nan_to_num(0.0)), name
            assert _same_records(records[name], records["torch"]), name
        for merger, restorer in zip(levels, reversed(levels), strict=True):
            with computing(restorer):
                ops.lora_unmerge_([merged[merger]], [records[merger]])
            assert _same(merged[merger], base), (merger, restorer)


def _runs(name: str) -> bool:
    try:
        with computing(name):
            return True
    except pytest.skip.Exception:
        return False


def test_tiny_numbers_have_the_same_bits_everywhere() -> None:
    """Products below the smallest normal number: the matrix units know no subnormals."""
    torch.manual_seed(5)
    base = torch.randn(48, 160) * 1e-38
    exponents = torch.randint(-70, -56, (40, 160)), torch.randint(-70, -56, (48, 40))
    down, up = (torch.randn(e.shape) * 2.0**e for e in exponents)
    deltas = [LoraDelta(down.bfloat16(), up.bfloat16(), 1.5)]
    deltas.append(replace(deltas[0], scale=-0.5))
    want = None
    for name in filter(_runs, LEVELS):
        weight = base.clone()
        with computing(name):
            (record,) = ops.lora_merge_([weight], [deltas])
            want = weight.clone() if want is None else want
            assert _same(weight, want), name
            ops.lora_unmerge_([weight], [record])
        assert _same(weight, base)
    assert want is not None and not torch.equal(want, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_cycles_leave_the_bytes(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    bases = [(torch.randn(size) * 0.02).to(dtype) for size in ((150, 300), (64, 96))]
    weights = [base.clone() for base in bases]
    for cycle in range(100):
        deltas = []
        for base in bases:
            some = []
            for _ in range(1 + cycle % 3):
                _, delta = random_weight(*base.shape, 1 + cycle % 40, 0.3, dtype, DTYPES[cycle % 3])
                some.append(replace(delta, scale=delta.scale * (-1) ** cycle))
            deltas.append(some)
        records = ops.lora_merge_(weights, deltas)
        assert not any(torch.equal(*pair) for pair in zip(weights, bases, strict=True))
        ops.lora_unmerge_(weights, records)
        for weight, base in zip(weights, bases, strict=True):
            assert _same(weight, base), cycle


@pytest.mark.parametrize("rank", [1, 16, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_per_weight(dtype: torch.dtype, rank: int) -> None:
    torch.manual_seed(rank)
    used = []
    for ratio in (0.08, 0.16, 0.6):
        base, delta = random_weight(384, 1024, rank, ratio, dtype, torch.bfloat16)
        weight = base.clone()
        (record,) = ops.lora_merge_([weight], [[delta]])
        assert not record.is_copy
        used.append(record.bits_per_weight)
        ops.lora_unmerge_([weight], [record])
        assert _same(weight, base)
    assert used == sorted(used) and used[-1] <= 5.0, used


def test_threads_and_company_do_not_change_a_bit(level: str) -> None:
    base, deltas = _set((200, 333, 40), torch.bfloat16, torch.bfloat16)
    other, more = _set((97, 64, 8), torch.float16, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            alone, second = base.clone(), other.clone()
            results.append((alone, *ops.lora_merge_([alone], [deltas])))
            together = base.clone()
            records = ops.lora_merge_([second, together], [more, deltas])
            results.append((together, records[1]))
    finally:
        torch.set_num_threads(threads)
    for weight, record in results:
        assert _same(weight, results[0][0]) and _same_records(record, results[0][1])
    for weight, record in results:
        ops.lora_unmerge_([weight], [record])
        assert _same(weight, base)


def test_segments_of_a_fused_weight(level: str) -> None:
    """q and v of a fused qkv have adapters of their own; the rows of k are not read or written."""
    torch.manual_seed(2)
    base = (torch.randn(3 * 70, 96) * 0.02).bfloat16()
    base[69, 0], base[150, 3] = -0.0, float("nan")
    parts = [random_weight(70, 96, rank, 0.1, base.dtype, base.dtype)[1] for rank in (4, 8)]
    deltas = [parts[0], replace(parts[1], start=140)]
    weight = base.clone()
    (record,) = ops.lora_merge_([weight], [deltas])
    keys = slice(70, 140)
    assert _same(weight[keys], base[keys]) and not torch.equal(weight[:70], base[:70])
    ops.lora_unmerge_([weight], [record])
    assert _same(weight, base)
    only_keys = [replace(parts[0], start=70)]
    (record,) = ops.lora_merge_([weight], [only_keys])
    assert record.start == 70 and record.shape == (70, 96)
    assert _same(weight[:70], base[:70]) and _same(weight[140:], base[140:])
    ops.lora_unmerge_([weight], [record])
    assert _same(weight, base)


@pytest.mark.parametrize("apart", [0, 8, 40])
@pytest.mark.parametrize("parts", ["0+112", "0+104", "0+64 96+104", "0+48 48+96", "0+96 48+16"])
def test_factors_wherever_they_are(level: str, parts: str, apart: int) -> None:
    """Where the rows of adapters begin and how many, in full tiles or not, `apart` in memory."""
    torch.manual_seed(len(parts))
    places = [tuple(map(int, part.split("+"))) for part in parts.split()]
    base = (torch.randn(max(map(sum, places)), 150) * 0.02).bfloat16()
    deltas = []
    for start, count in places:
        _, delta = random_weight(count, 150, 32, 0.1, base.dtype, base.dtype)
        storage = torch.full((count, 32 + apart), float("nan")).bfloat16()
        up = storage[:, apart:].copy_(delta.up)
        deltas.append(replace(delta, up=up, start=start))
    with ops.using(lora_merge_="torch"):
        (want,) = ops.lora_merge_([truth := base.clone()], [deltas])
    (record,) = ops.lora_merge_([weight := base.clone()], [deltas])
    assert _same(weight, truth) and _same_records(record, want)
    ops.lora_unmerge_([weight], [record])
    assert _same(weight, base)


def test_strided_weights_and_factors(level: str) -> None:
    torch.manual_seed(3)
    storage = (torch.randn(100, 200) * 0.02).bfloat16()
    before = storage.clone()
    weight = torch.nn.Parameter(storage[10:90, 33:162])
    _, delta = random_weight(80, 129, 12, 0.1, storage.dtype, storage.dtype)
    sparse = LoraDelta(delta.down.T.contiguous().T, delta.up.T.contiguous().T, 0.5)
    (record,) = ops.lora_merge_([weight], [[sparse]])
    dense = before[10:90, 33:162].clone()
    ops.lora_merge_([dense], [[delta]])
    assert _same(weight.detach(), dense)
    weight.data = storage[10:90, 33:162]
    ops.lora_unmerge_([weight], [record])
    assert _same(storage, before)


def test_weights_that_suit_no_code_are_kept_whole(level: str) -> None:
    _, delta = random_weight(480, 1024, 4, 0.1, torch.bfloat16, torch.bfloat16)
    for base in (torch.zeros(480, 1024), torch.full((480, 1024), -0.0)):
        base = base.bfloat16()
        weight = base.clone()
        (record,) = ops.lora_merge_([weight], [[delta]])
        assert record.is_copy and 16 <= record.bits_per_weight < 16.1
        ops.lora_unmerge_([weight], [record])
        assert _same(weight, base)
    # Only what the choice of a code looks at is like a trained weight.
    for index in range(8):
        block, panel = divmod(index * 80 // 8, 8)
        at = slice(48 * block, 48 * block + 48), slice(128 * panel, 128 * panel + 128)
        base[at] = (torch.randn(48, 128) * 0.02).bfloat16()
    weight = base.clone()
    (record,) = ops.lora_merge_([weight], [[delta]])
    assert record.is_copy and record.bits_per_weight < 16.1
    ops.lora_unmerge_([weight], [record])
    assert _same(weight, base)


def test_what_changed_while_merged_is_an_error(level: str) -> None:
    base, delta = random_weight(96, 160, 8, 0.1, torch.bfloat16, torch.float32)
    (record,) = ops.lora_merge_([weight := base.clone()], [[delta]])
    weight[5, 7] *= 1.01
    with pytest.raises(EngineError, match="Weight 0 could not be restored"):
        ops.lora_unmerge_([weight], [record])
    (record,) = ops.lora_merge_([weight := base.clone()], [[delta]])
    delta.up[3] *= 1.5
    with pytest.raises(EngineError, match="Load the weights again"):
        ops.lora_unmerge_([weight], [record])


def test_adapters_that_are_not_finite_change_nothing(level: str) -> None:
    base, delta = random_weight(60, 70, 8, 0.1, torch.bfloat16, torch.bfloat16)
    wrongs = [replace(delta, scale=float("inf"))]
    for dtype, value in zip(DTYPES, (float("nan"), float("inf"), -float("inf")), strict=True):
        down, up = (x.to(dtype, copy=True) for x in (delta.down, delta.up))
        down[7, 69] = up[0, 0] = value
        wrongs += [replace(delta, down=down), replace(delta, up=up)]
    weights = [base.clone(), base.clone()]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="an adapter of weight 1 is not finite"):
            ops.lora_merge_(weights, [[delta], [delta, wrong]])
        assert all(_same(weight, base) for weight in weights)


def test_a_record_can_be_stored_and_empty(level: str) -> None:
    base, delta = random_weight(96, 160, 8, 0.1, torch.float16, torch.float16)
    (record,) = ops.lora_merge_([weight := base.clone()], [[delta]])
    moved = record.to("cpu")
    stored = replace(moved, codes=moved.codes.clone(), escapes=moved.escapes.clone())
    assert stored.nbytes == sum(x.nbytes for x in (record.codes, record.escapes, record.ends))
    ops.lora_unmerge_([weight], [stored])
    assert _same(weight, base)
    assert ops.lora_merge_([], []) == ()
    ops.lora_unmerge_([], [])
    nothing = LoraDelta(torch.randn(4, 160), torch.randn(0, 4), start=96)
    (record,) = ops.lora_merge_([weight], [[nothing]])
    ops.lora_unmerge_([weight], [record])
    assert _same(weight, base) and record.nbytes <= 8


def test_wrong_shapes_are_errors() -> None:
    base, delta = random_weight(20, 30, 4, 0.1, torch.float32, torch.float32)
    for wrong, words in (
        (replace(delta, down=torch.randn(4, 29)), "in is 30"),
        (replace(delta, up=torch.randn(20, 5)), "rank is 4"),
        (replace(delta, start=1), "out, which is 20"),
    ):
        with pytest.raises(AssertionError, match=words):
            ops.lora_merge_([base], [[wrong]])
    with pytest.raises(AssertionError, match="at least one adapter"):
        ops.lora_merge_([base], [[]])
    with pytest.raises(AssertionError, match="listed twice"):
        ops.lora_merge_([base, base], [[delta], [delta]])
    (record,) = ops.lora_merge_([base], [[delta]])
    with pytest.raises(AssertionError, match="is not of"):
        ops.lora_unmerge_([torch.zeros(19, 30)], [record])
    with pytest.raises(AssertionError, match="merged by another, not chains-32"):
        ops.lora_unmerge_([base], [replace(record, algorithm="another")])


@pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")
def test_the_native_ops_check_what_they_are_given() -> None:
    weight, delta = random_weight(96, 160, 4, 0.1, torch.bfloat16, torch.bfloat16)
    parts = [[weight], [delta.down], [delta.up], [0.5], [0], [1]]

    def merge(**other: object) -> None:
        names = ("weights", "downs", "ups", "scales", "starts", "counts")
        torch.ops.sgld.lora_merge_(**(dict(zip(names, parts, strict=True)) | other))

    for other, words in (
        ({"downs": [delta.down[:, :8]]}, "where columns of the weight is 160"),
        ({"ups": [delta.up[:, :3]]}, "where rank of down is 4"),
        ({"starts": [7]}, "are not within the weight's 96"),
        ({"counts": [2]}, "fewer adapters than counts"),
        ({"counts": [0]}, "more adapters than counts"),
        ({"weights": [weight.T]}, "dense in its last dimension"),
        ({"weights": [weight.double()]}, "weight must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=words):
            merge(**other)
    (record,) = ops.lora_merge_([weight], [[delta]])
    for change in (
        {"codes": record.codes[:, :-1].contiguous()},
        {"codes": record.codes.long()},
        {"escapes": record.escapes[1:]},
        {"ends": record.ends.flip(0)},
    ):
        with ops.using(lora_unmerge_="cpu"), pytest.raises(ValueError, match="a record is not one"):
            ops.lora_unmerge_([weight], [replace(record, **change)])


def test_the_float_mode_and_the_tiles_of_others_stay(level: str) -> None:
    """torch may flush subnormals in this thread; oneDNN keeps tiles set up between its calls."""
    base, deltas = _set((97, 140, 40), torch.bfloat16, torch.bfloat16)
    a, b = torch.randn(2, 256, 256).bfloat16()
    product = a @ b
    weight = base.clone()
    (record,) = ops.lora_merge_([weight], [deltas])
    assert torch.equal(a @ b, product)
    if level == "torch" or not torch.set_flush_denormal(True):
        return
    try:
        ops.lora_unmerge_([weight], [record])
        assert (torch.full((8,), 1e-38) * 0.1 == 0).all(), "the mode of the thread was changed"
    finally:
        torch.set_flush_denormal(False)
    assert _same(weight, base)


def test_the_cap_of_the_cpu_level_holds() -> None:
    for isa in ("avx512", "avx2", "scalar"):
        if _runs(f"cpu-{isa}"):
            with computing(f"cpu-{isa}"):
                assert torch.ops.sgld.lora_cpu_units() == isa
    if _runs("cpu-avx512_bf16"):
        with computing("cpu-avx512_bf16"):
            assert torch.ops.sgld.lora_cpu_units() in ("amx", "avx512_vbmi2", "avx512")
