"""The passes of the GPU's LoRA merge, tile after tile on the CPU: what lies between two of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.ops import LoraDelta, cuda_lora, library, lora_truth
from tests.refs.lora import random_weight

pytestmark = pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")

SHAPES = [(100, 333), (48, 128), (7, 5), (150, 40)]


def _set(dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], list[list[LoraDelta]]]:
    torch.manual_seed(3)
    pairs = [random_weight(*shape, 16, 0.3, dtype, torch.bfloat16) for shape in SHAPES]
    return [weight for weight, _ in pairs], [[delta] for _, delta in pairs]


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_a_matrix_that_found_too_little_room_is_taken_back_and_merged_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, deltas = _set()
    expected = [weight.clone() for weight in weights]
    wanted = [lora_truth.merge(*pair) for pair in zip(expected, deltas, strict=True)]
    choose = cuda_lora._choose_bits
    small = [0, 5, 0, 2000]  # escapes: none of the first, some of the second, all of the last

    def too_small(matrices: list[cuda_lora._Matrix]) -> list[int]:
        choose(matrices)
        return list(small)

    monkeypatch.setattr(cuda_lora, "_choose_bits", too_small)
    merged = [weight.clone() for weight in weights]
    parts = cuda_lora.merge(merged[0], merged, deltas)
    assert max(len(escapes) for _, escapes, _, _ in parts) > 5
    for i, (codes, escapes, ends, checksum) in enumerate(parts):
        assert _same(merged[i], expected[i])
        assert _same(codes, wanted[i][0]) and _same(escapes, wanted[i][1])
        assert torch.equal(ends, wanted[i][2]) and checksum == wanted[i][3]


def test_weights_of_several_dtypes_and_copies_share_a_call() -> None:
    weights, deltas = _set()
    weights[1] = weights[1].float()
    weights[2] = weights[2] * 1e-6  # far smaller than what is added: kept whole
    before = [weight.clone() for weight in weights]
    with ops.using(lora_merge_="cuda", lora_unmerge_="cuda"):
        records = ops.lora_merge_(weights, deltas)
        assert [record.is_copy for record in records] == [False, False, True, False]
        assert not any(map(torch.equal, weights, before))
        ops.lora_unmerge_(weights, records)
    assert all(map(_same, weights, before))


def test_a_record_of_another_weight_is_an_error_and_changes_nothing() -> None:
    weights, deltas = _set()
    with ops.using(lora_merge_="cuda", lora_unmerge_="cuda"):
        records = ops.lora_merge_(weights, deltas)
        merged = [weight.clone() for weight in weights]
        bad = replace(records[0], codes=records[0].codes[:, :-1].contiguous())
        with pytest.raises(ValueError, match=r"not one of a weight \[100, 333\]"):
            ops.lora_unmerge_(weights, [bad, *records[1:]])
        assert all(map(_same, weights, merged))


def test_tables_are_checked() -> None:
    weights, deltas = _set()
    passes = cuda_lora._Passes([cuda_lora._matrix(weights[0], deltas[0])])
    passes.starts = passes.starts[:-1]
    with pytest.raises(ValueError, match="the table starts"):
        passes.run(cuda_lora._COUNT)
