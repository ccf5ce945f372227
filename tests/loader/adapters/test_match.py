"""Adapters against the shapes of a model."""

from __future__ import annotations

import torch

from sgl_diffusion.loader.adapters.match import match
from sgl_diffusion.loader.adapters.types import Adapter, Delta, FullDelta, LowRank
from tests.loader.adapters.tiny import draw

TABLE = {
    "a.to_q.weight": (6, 4),
    "a.to_q.bias": (6,),
    "a.to_k.weight": (2, 4),
    "a.to_v.weight": (2, 4),
    "patch.weight": (6, 2, 1, 2),
    "table": (1, 2, 4),
}


def _low(out: int = 6, width: int = 4) -> LowRank:
    return LowRank(draw(2, width), draw(out, 2))


def _adapter(**components: dict[str, tuple[Delta, ...]]) -> Adapter:
    return Adapter("x", "x.safetensors", components)


def test_matched_and_unmatched() -> None:
    adapter = _adapter(
        transformer={
            "a.to_q": (_low(), FullDelta(draw(6), "bias")),
            "b.to_q": (_low(),),
            "patch": (_low(),),
            "": (FullDelta(draw(1, 2, 4), "table"),),
        },
        text_encoder={"c": (_low(),)},
    )
    found = match(adapter, {"transformer": TABLE})
    assert set(found.matched["transformer"]) == {"a.to_q", "patch", ""}
    assert len(found.matched["transformer"]["a.to_q"]) == 2
    assert set(found.unmatched) == {
        "transformer.b.to_q",
        "text_encoder.c",
    }
    assert not found.misfits and found.layers == 3


def test_layers_that_do_not_fit() -> None:
    modules: dict[str, tuple[Delta, ...]] = {
        "a.to_q": (_low(4),),
        "a.to_k": (FullDelta(draw(2), "bias"),),
        "table": (_low(),),
    }
    found = match(_adapter(transformer=modules), {"transformer": TABLE})
    assert found.misfits == (
        "transformer.a.to_q.weight is 6x4 here and 4x4 there",
        "transformer.a.to_k has no bias",
    )
    assert found.unmatched == ("transformer.table",) and not found.layers


def test_both_experts() -> None:
    tables = {"transformer": TABLE, "transformer_2": TABLE}
    one = _adapter(transformer={"a.to_q": (_low(),)})
    assert set(match(one, tables).matched) == {"transformer", "transformer_2"}
    assert set(match(one, {"transformer_2": TABLE}).matched) == {"transformer_2"}
    assert not match(one, {"transformer_2": TABLE}).unmatched
    low = _adapter(transformer_2={"a.to_q": (_low(),)})
    assert set(match(low, tables).matched) == {"transformer_2"}


def test_a_fused_change_is_split_where_the_model_is_not_fused() -> None:
    fused, bias = _low(10), FullDelta(draw(10), "bias")
    table = {**TABLE, "a.to_k.bias": (2,), "a.to_v.bias": (2,)}
    found = match(_adapter(transformer={"a.to_qkv": (fused, bias)}), {"transformer": table})
    modules = found.matched["transformer"]
    assert list(modules) == ["a.to_q", "a.to_k", "a.to_v"]
    for index, whole in enumerate((fused, bias)):
        parts = [deltas[index].delta() for deltas in modules.values()]
        assert torch.equal(torch.cat(parts), whole.delta())
    kept = match(
        _adapter(transformer={"a.to_qkv": (fused,)}), {"transformer": {"a.to_qkv.weight": (10, 4)}}
    )
    assert list(kept.matched["transformer"]) == ["a.to_qkv"]
    wrong = match(_adapter(transformer={"a.to_qkv": (_low(9),)}), {"transformer": TABLE})
    assert wrong.unmatched == ("transformer.a.to_qkv",)


def test_clip_with_and_without_its_prefix() -> None:
    for inside, outside in (("", "text_model."), ("text_model.", ""), ("", "")):
        adapter = _adapter(text_encoder={f"{outside}layers.0.fc1": (_low(),)})
        table = {f"{inside}layers.0.fc1.weight": (6, 4)}
        found = match(adapter, {"text_encoder": table})
        assert list(found.matched["text_encoder"]) == [f"{inside}layers.0.fc1"]
