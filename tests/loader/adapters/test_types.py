"""The kinds of change: their deltas, and that a segment of rows is the same rows of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion.loader.adapters.types import Adapter, Delta, Dora, FullDelta, Hada, Kron, LowRank

OUT, IN, RANK = 12, 8, 3


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _kinds() -> list[Delta]:
    low = LowRank(_draw(RANK, IN), _draw(OUT, RANK), 0.5)
    return [
        low,
        FullDelta(_draw(OUT, IN), scale=2.0),
        Hada(_draw(OUT, 2), _draw(2, IN), _draw(OUT, RANK), _draw(RANK, IN), 0.25),
        Kron((_draw(3, 2),), (_draw(4, 4),), 0.5),
        Kron((_draw(3, 2),), (_draw(4, RANK), _draw(RANK, 4)), 0.5),
        Dora(low, _draw(OUT, 1).abs()),
    ]


@pytest.mark.parametrize("delta", _kinds(), ids=lambda d: d.kind)
def test_rows_are_those_of_the_whole(delta: Delta) -> None:
    base = _draw(OUT, IN)
    whole = delta.delta(base, strength=0.8)
    assert whole.shape == delta.shape == (OUT, IN)
    part = delta.rows(2, 9)
    assert part.shape == (7, IN)
    torch.testing.assert_close(part.delta(base[2:9], strength=0.8), whole[2:9])
    nested = part.rows(1, 4)
    torch.testing.assert_close(nested.delta(base[3:6], strength=0.8), whole[3:6])


def test_only_low_rank_changes_are_per_request() -> None:
    assert [delta.per_request for delta in _kinds()] == [True, False, False, False, False, False]


def test_dora_gives_the_rows_their_length() -> None:
    base, dora = _draw(OUT, IN), _kinds()[-1]
    assert isinstance(dora, Dora)
    merged = base + dora.delta(base)
    torch.testing.assert_close(merged.norm(dim=1, keepdim=True), dora.magnitude)
    columns = Dora(dora.change, _draw(1, IN).abs())
    merged = base + columns.delta(base)
    torch.testing.assert_close(merged.norm(dim=0, keepdim=True), columns.magnitude)


def test_an_adapter_counts_a_shared_tensor_once() -> None:
    fused = LowRank(_draw(RANK, IN), _draw(OUT, RANK))
    parts = {name: (fused.rows(4 * i, 4 * i + 4),) for i, name in enumerate("qkv")}
    adapter = Adapter("x", "a.safetensors", {"transformer": parts})
    assert adapter.nbytes == 4 * (RANK * IN + OUT * RANK)
    assert (adapter.layers, adapter.rank, adapter.per_request) == (3, RANK, True)


def test_a_file_without_experts_is_meant_for_both() -> None:
    one = {"a": (LowRank(_draw(1, 1), _draw(1, 1)),)}
    both = {"transformer": one, "transformer_2": {}}
    assert Adapter("x", "", {"transformer": one}).of("transformer_2") == one
    assert Adapter("x", "", both).of("transformer_2") == {}
    assert Adapter("x", "", {"transformer_2": one}).of("transformer") == {}
    assert Adapter("x", "", {"transformer": one}).of("text_encoder") == {}
