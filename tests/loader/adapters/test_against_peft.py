"""Folders that PEFT saved: the merged weights are those that PEFT merges."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.types import Adapter, Dora
from tests.loader.adapters.tiny import assert_same, built, draw, merged, pair, read, write

WAN = "WanTransformer3DModel"
TARGETS = ["blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.2"]


def _saved(model: nn.Module, config: Any, folder: Path) -> dict[str, Tensor]:
    """Save an adapter with drawn weights into the folder; the weights that PEFT merges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for index, (name, parameter) in enumerate(adapted.named_parameters()):
                if parameter.requires_grad:
                    value = draw(*parameter.shape, seed=index)
                    parameter.copy_(value.abs() if "magnitude" in name else value)
        adapted.save_pretrained(folder)
        return adapted.merge_and_unload().state_dict()


def _check(config: Any, folder: Path) -> Adapter:
    model = built(WAN)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = _saved(model, config, folder)
    adapter = read(folder, WAN)
    ours = merged(built(WAN), adapter, WAN)
    assert_same(ours, theirs)
    changed = {key for key in before if not torch.equal(before[key], ours[key])}
    assert {f"{target}.weight" for target in TARGETS} <= changed
    return adapter


def test_lora(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    adapter = _check(config, tmp_path)
    assert (adapter.format, adapter.alpha, adapter.rank) == ("PEFT", 6, 4)


def test_patterns_and_rank_stabilised_scale(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        rank_pattern={"to_q": 2, r"blocks\.\d+\.ffn\.net\.2": 8},
        alpha_pattern={"attn1.to_q": 5, "^blocks.1.ffn.net.2": 9},
        target_modules=TARGETS,
    )
    assert _check(config, tmp_path).ranks == (2, 4, 8)


def test_bias_of_the_upper_factor(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=TARGETS)
    assert _check(config, tmp_path).kinds == ("full", "low rank")


def test_convolution(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=[*TARGETS, "patch_embedding"])
    adapter = _check(config, tmp_path)
    (delta,) = adapter.components["transformer"]["patch_embedding"]
    assert delta.shape == (64, 16 * 4)


def test_dora(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=TARGETS)
    adapter = _check(config, tmp_path)
    assert (adapter.format, adapter.kinds) == ("PEFT DoRA", ("DoRA",))
    assert not adapter.per_request


def test_loha(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=4, alpha=6, alpha_pattern={"to_q": 3}, target_modules=TARGETS)
    assert _check(config, tmp_path).kinds == ("LoHa",)


@pytest.mark.parametrize(("rank", "both"), [(2, False), (2, True), (16, False)])
def test_lokr(rank: int, both: bool, tmp_path: Path) -> None:
    """At a high rank PEFT keeps whole factors, and still scales them by alpha / rank."""
    config = peft.LoKrConfig(
        r=rank,
        alpha=6,
        decompose_both=both,
        rank_pattern={"ffn.net.2": rank + 1},
        target_modules=TARGETS,
    )
    adapter = _check(config, tmp_path)
    assert adapter.kinds == ("LoKr",)
    assert bool(adapter.ranks) == (rank < 16)


def test_dora_scale_of_other_trainers(tmp_path: Path) -> None:
    """LyCORIS has the magnitude as a column, or as a row for the lengths of the columns."""
    for magnitude, by_column in ((draw(64, 1), False), (draw(1, 96), True)):
        layer = "lycoris_blocks_1_ffn_net_2"
        tensors = pair(layer, (64, 96), ("lora_down", "lora_up"), alpha=2.0)
        tensors[f"{layer}.dora_scale"] = magnitude.abs()
        adapter = read(write(tmp_path, tensors), WAN)
        (delta,) = adapter.components["transformer"]["blocks.1.ffn.net.2"]
        assert isinstance(delta, Dora) and delta.by_column == by_column
        assert adapter.format == "LyCORIS DoRA"


def test_what_peft_offers_and_we_do_not_is_named(tmp_path: Path) -> None:
    refused = {
        "IA3": peft.IA3Config(target_modules=["ffn.net.2"], feedforward_modules=["ffn.net.2"]),
        "OFT": peft.OFTConfig(
            r=0, oft_block_size=4, target_modules=["ffn.net.2"], use_cayley_neumann=False
        ),
        "whole weights": peft.LoraConfig(target_modules=TARGETS, modules_to_save=["proj_out"]),
        "pissa": peft.LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"),
    }
    for index, (what, config) in enumerate(refused.items()):
        folder = tmp_path / str(index)
        _saved(built(WAN), config, folder)
        with pytest.raises(RequestError, match="not supported") as caught:
            read(folder, WAN)
        assert caught.value.code == "invalid_lora"
        assert what in caught.value.message
