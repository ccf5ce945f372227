"""LoRA merge, unmerge and apply on a GPU; unmerge must return every bit, a hundred times over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.ops import LoraDelta, triton_lora
from tests.gpu.common import close, fresh, same

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1), (130, 257), (3072, 3072), (1536, 8960), (5, 123)]


def _adapters(rank: int, size: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    a = [fresh(rank, n, dtype=dtype) for _, n in SHAPES]
    return a, [fresh(m, rank, dtype=dtype, size=size * 0.02 / rank**0.5) for m, _ in SHAPES]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 40, 128])
def test_merge_and_unmerge(rank: int, dtype: torch.dtype) -> None:
    weights = [fresh(*shape, dtype=dtype, size=0.02) for shape in SHAPES]
    before = [w.clone() for w in weights]
    a, b = _adapters(rank, 0.3, dtype)
    scales = [1.0, -0.5, 1.0, 1.5, 0.25]
    codes = triton_lora.lora_merge_(weights, a, b, scales)
    assert codes.failed() == [] and codes.bits_per_weight(weights) < 5.1
    for w, old, down, up, scale in zip(weights, before, a, b, scales, strict=True):
        close(w, old.double() + scale * (up.double() @ down.double()))
    triton_lora.lora_unmerge_(weights, a, b, scales, codes)
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w, old)


def test_a_hundred_cycles_leave_the_weights_as_they_were() -> None:
    weights = [fresh(*shape, size=0.02) for shape in SHAPES]
    before = [w.clone() for w in weights]
    for cycle in range(100):
        rank = (4, 16, 64, 128)[cycle % 4]
        a, b = _adapters(rank, 0.1 + 0.005 * cycle, torch.bfloat16)
        scales = [1.0] * len(SHAPES)
        codes = triton_lora.lora_merge_(weights, a, b, scales)
        assert codes.failed() == []
        triton_lora.lora_unmerge_(weights, a, b, scales, codes)
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w, old)


@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_gets_the_bits_of_the_cpu(dtype: torch.dtype, factor: torch.dtype) -> None:
    """Merged weights and records: a merge on one is undone on the other."""
    weights, deltas = [], []
    for rows, columns in [(1, 1), (130, 257), (1536, 3072), (5, 123), (300, 512)]:
        weights.append(fresh(rows, columns, dtype=dtype, size=0.02))
        down, up = fresh(41, columns, dtype=factor), fresh(rows, 41, dtype=factor, size=1e-3)
        more = LoraDelta(fresh(8, columns), fresh(rows // 2, 8, size=1e-3), -0.7, rows // 3)
        deltas.append([LoraDelta(down, up, 0.5), more])
    weights[1].view(-1)[:4] = torch.tensor([0.0, -0.0, float("nan"), -float("inf")])
    before = [weight.cpu() for weight in weights]
    on_cpu = [weight.clone() for weight in before]
    moved = [
        [LoraDelta(d.down.cpu(), d.up.cpu(), d.scale, d.start) for d in some] for some in deltas
    ]
    wanted = ops.lora_merge_(on_cpu, moved)
    with ops.using(lora_merge_="cuda", lora_unmerge_="cuda"):
        records = ops.lora_merge_(weights, deltas)
        for record, want, weight, merged in zip(records, wanted, weights, on_cpu, strict=True):
            assert same(weight.cpu().nan_to_num(), merged.nan_to_num())
            assert same(record.codes.cpu(), want.codes) and same(record.escapes.cpu(), want.escapes)
            assert torch.equal(record.ends.cpu(), want.ends) and record.checksum == want.checksum
        ops.lora_unmerge_(weights, records)
    assert all(map(same, [weight.cpu() for weight in weights], before))


def test_cuda_a_hundred_cycles_leave_the_weights_as_they_were() -> None:
    weights = [fresh(*shape, size=0.02) for shape in SHAPES]
    before = [w.clone() for w in weights]
    with ops.using(lora_merge_="cuda", lora_unmerge_="cuda"):
        for cycle in range(100):
            a, b = _adapters((4, 16, 64, 128)[cycle % 4], 0.1 + 0.005 * cycle, torch.bfloat16)
            deltas = [[LoraDelta(down, up)] for down, up in zip(a, b, strict=True)]
            ops.lora_unmerge_(weights, ops.lora_merge_(weights, deltas))
    assert all(map(same, weights, before))


def test_apply_by_token() -> None:
    x, y = fresh(777, 3072), fresh(777, 1030)
    a, b = fresh(3, 24, 3072, size=3072**-0.5), fresh(3, 1030, 24, size=24**-0.5)
    scales = torch.tensor([1.0, -2.0, 0.5], device="cuda")
    index = torch.randint(-1, 3, (777,), dtype=torch.int32, device="cuda").sort().values
    want = y.double()
    for n in range(3):
        part = scales[n] * (x.double() @ a[n].double().T) @ b[n].double().T
        want = want + torch.where((index == n)[:, None], part, 0.0)
    triton_lora.lora_apply_(y, x, a, b, scales, index)
    close(y, want, steps=4)


def test_the_op_applies_segments_by_row() -> None:
    def delta(rank: int, rows: int, start: int) -> LoraDelta:
        down = fresh(rank, 1536, size=1536**-0.5)
        return LoraDelta(down, fresh(rows, rank, size=rank**-0.5), 0.5, start)

    adapters = [[delta(16, 512, 0), delta(16, 512, 1024)], [delta(64, 1536, 0)]]
    x, y = fresh(2, 300, 1536), fresh(2, 300, 1536)
    index = torch.randint(-1, 2, (2,), device="cuda")
    with ops.using(lora_apply="triton"):
        got = ops.lora_apply(x, y, adapters, index)
    want = y.double()
    for row, number in enumerate(index.tolist()):
        for part in adapters[number] if number >= 0 else []:
            own = (x[row].double() @ part.down.double().T) @ part.up.double().T
            want[row, :, part.start : part.end] += part.scale * own
    close(got, want, steps=4)


@pytest.mark.parametrize("rank", [16, 200])
def test_a_stack_is_captured_with_what_is_written_into_it(rank: int) -> None:
    """Nothing that a launch takes was made on the host for this call. Not yet run on a GPU."""
    part = ops.LoraPart(
        fresh(2, rank, 1536, size=1536**-0.5),
        fresh(2, 1024, rank, dtype=torch.float32, size=rank**-0.5),
        512,
    )
    stack, x, y = ops.LoraStack([part]), fresh(2, 300, 1536), fresh(2, 300, 1536)
    index = torch.tensor([1, -1], dtype=torch.int32, device="cuda")
    with ops.using(lora_apply="triton"):
        ops.lora_apply(x, y, stack, index)  # compiled by now
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ops.lora_apply(x, y, stack, index)
        for numbers in ([1, -1], [0, 1], [-1, -1]):
            part.up.mul_(-0.5)
            index.copy_(torch.tensor(numbers))
            graph.replay()
            assert same(got, ops.lora_apply(x, y, stack, index))
            want = y.double()
            for row, number in enumerate(numbers):
                if number >= 0:
                    own = x[row].double() @ part.down[number].double().T
                    want[row, :, 512:] += own @ part.up[number].double().T
            close(got, want, steps=4)
