"""The native merge works on many matrices at a time, whose blocks its threads share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.ops import LoraDelta, LoraRecord, library
from tests.refs.lora import random_weight

BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    threads = torch.get_num_threads()
    with ops.using(lora_merge_="cpu", lora_unmerge_="cpu"):
        yield
    torch.set_num_threads(threads)


def alone(base: Tensor, deltas: list[LoraDelta]) -> tuple[Tensor, LoraRecord]:
    """One matrix, merged by one thread."""
    torch.set_num_threads(1)
    weight = base.clone()
    (record,) = ops.lora_merge_([weight], [deltas])
    return weight, record


def check_same(a: tuple[Tensor, LoraRecord], b: tuple[Tensor, LoraRecord]) -> None:
    (weight, record), (other, own) = a, b
    assert torch.equal(weight, other)
    assert torch.equal(record.codes, own.codes)
    assert torch.equal(record.escapes, own.escapes)
    assert torch.equal(record.ends, own.ends)
    assert record.checksum == own.checksum


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_each_matrix_is_as_if_it_were_alone(threads: int) -> None:
    """Wide and narrow ones, empty ones, one that is kept whole, several adapters on one."""
    torch.manual_seed(3)
    bases, deltas = [], []
    for out, width, rank in [(500, 700, 4), (0, 64, 2), (60, 3000, 8), (90, 0, 2), (1300, 100, 40)]:
        weight, delta = random_weight(out, width, rank, 0.1, BF16, BF16)
        bases.append(weight)
        deltas.append([delta])
    deltas[0].append(LoraDelta(deltas[0][0].down, deltas[0][0].up[100:300], -0.5, 100))
    bases.insert(2, torch.zeros(200, 400, dtype=BF16))
    deltas.insert(2, [LoraDelta(torch.randn(2, 400), torch.randn(200, 2), 1.0)])
    weights = [base.clone() for base in bases]
    torch.set_num_threads(threads)
    records = ops.lora_merge_(weights, deltas)
    assert records[2].is_copy and not records[0].is_copy
    for base, given, weight, record in zip(bases, deltas, weights, records, strict=True):
        check_same((weight, record), alone(base, given))
    torch.set_num_threads(threads)
    ops.lora_unmerge_(weights, records)
    for weight, base in zip(weights, bases, strict=True):
        assert torch.equal(weight, base)


def test_one_too_large_for_company_changes_nothing_for_the_others() -> None:
    """A batch has 2**23 numbers; what is larger is one by itself."""
    torch.manual_seed(0)
    pairs = [random_weight(96, 130, 4, 0.1, BF16, BF16) for _ in range(2)]
    row, delta = random_weight(1, 1 << 14, 1, 0.1, BF16, BF16)
    large = LoraDelta(delta.down, delta.up.repeat(520, 1), 1.0)
    pairs.insert(1, (row.repeat(520, 1), large))
    weights = [base.clone() for base, _ in pairs]
    records = ops.lora_merge_(weights, [[delta] for _, delta in pairs])
    assert not torch.equal(weights[1], pairs[1][0])
    for index in (0, 2):
        base, delta = pairs[index]
        check_same((weights[index], records[index]), alone(base, [delta]))
    ops.lora_unmerge_(weights, records)
    for weight, (base, _) in zip(weights, pairs, strict=True):
        assert torch.equal(weight, base)
