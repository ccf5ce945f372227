"""One file as a whole: what it is called, what is left over, and what makes it unusable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.types import FullDelta, LowRank
from tests.loader.adapters.tiny import draw, pair, read, write

WAN, FLUX, Z_IMAGE = "WanTransformer3DModel", "FluxTransformer2DModel", "ZImageTransformer2DModel"
KOHYA = ("lora_down", "lora_up")
LAYER = "blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("prefix", "names", "called"),
    [
        ("", ("lora_A", "lora_B"), "diffusers"),
        ("transformer.", ("lora_A", "lora_B"), "diffusers"),
        ("transformer.", KOHYA, "diffusers"),
        ("transformer.", ("lora_A.default", "lora_B.default"), "diffusers"),
        ("diffusion_model.", ("lora_A", "lora_B"), "ComfyUI"),
        ("base_model.model.", ("lora_A", "lora_B"), "PEFT"),
        ("base_model.model.transformer.", ("lora_A.style", "lora_B.style"), "PEFT"),
        ("", ("lora.down", "lora.up"), "diffusers"),
    ],
)
def test_what_stands_around_a_layer_does_not_matter(
    prefix: str, names: tuple[str, str], called: str, tmp_path: Path
) -> None:
    tensors = pair(prefix + LAYER, (64, 64), names, alpha=0.3)
    adapter = read(write(tmp_path, tensors), WAN)
    ((module, (delta,)),) = adapter.components["transformer"].items()
    assert module == LAYER and isinstance(delta, LowRank)
    down, up, alpha = tensors.values()
    assert torch.equal(delta.down, down) and torch.equal(delta.up, up)
    assert delta.scale == float(alpha) / 4 and adapter.alpha == float(alpha)
    assert adapter.format == called


def test_an_alpha_that_is_given_wins(tmp_path: Path) -> None:
    tensors = pair(LAYER, (64, 64), alpha=8.0) | pair("blocks.1.attn1.to_q", (64, 64), rank=2)
    path = write(tmp_path, tensors)
    assert [d.scale for d in read(path, WAN).deltas() if isinstance(d, LowRank)] == [2, 1]
    adapter = read(path, WAN, alpha=0.5)
    assert [d.scale for d in adapter.deltas() if isinstance(d, LowRank)] == [0.125, 0.25]
    assert adapter.alpha == 0.5


def test_the_alpha_of_a_layer_wins_over_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4}))
    tensors = pair(LAYER, (64, 64), alpha=8.0) | pair("blocks.1.attn1.to_q", (64, 64))
    path = write(tmp_path, tensors, "adapter_model.safetensors")
    adapter = read(path, WAN)
    assert [d.scale for d in adapter.deltas() if isinstance(d, LowRank)] == [2, 0.5]
    assert adapter.alpha is None
    # It is about PEFT's file, not about others in the folder.
    other = read(write(tmp_path, tensors, "other.safetensors"), WAN)
    assert [d.scale for d in other.deltas() if isinstance(d, LowRank)] == [2, 1]
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(RequestError, match="adapter_config.json"):
        read(path, WAN)


def test_half_precision_factors_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {key: value.bfloat16() for key, value in pair(LAYER, (64, 64)).items()}
    adapter = read(write(tmp_path, tensors), WAN)
    (delta,) = adapter.components["transformer"][LAYER]
    assert isinstance(delta, LowRank) and delta.down.dtype == torch.bfloat16
    assert adapter.nbytes == 2 * (4 * 64 + 64 * 4)
    assert delta.delta().dtype == torch.float32


def test_keys_that_name_no_layer_are_listed(tmp_path: Path) -> None:
    tensors = pair("lora_unet_blocks_0_self_attn_q", (64, 64), KOHYA, alpha=1.0)
    other = pair("lora_unet_blocks_0_other", (64, 64), KOHYA, alpha=1.0)
    rest = {"step": torch.tensor(1), "blocks.0.attn1.to_k.alpha": torch.tensor(1.0)}
    adapter = read(write(tmp_path, tensors | other | rest), WAN)
    assert set(adapter.unmatched) == set(other) | set(rest)
    assert adapter.layers == 1


def test_a_file_that_matches_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, pair("lora_unet_double_blocks_0_img_attn_proj", (64, 64), KOHYA))
    with pytest.raises(RequestError, match="names no layer of Wan: none of its 2 keys") as caught:
        read(path, WAN)
    assert caught.value.code == "invalid_lora" and "Wan" in caught.value.hint
    with pytest.raises(RequestError, match="none of its 1 keys"):
        read(write(tmp_path, {"x": draw(2)}), WAN)


def test_one_layer_under_two_names(tmp_path: Path) -> None:
    tensors = pair(f"transformer.{LAYER}", (64, 64))
    with pytest.raises(RequestError, match="are the same"):
        read(write(tmp_path, tensors | pair(f"diffusion_model.{LAYER}", (64, 64))), WAN)
    native = pair("diffusion_model.blocks.0.self_attn.q", (64, 64))
    with pytest.raises(RequestError, match="are the same layer, blocks.0.attn1.to_q"):
        read(write(tmp_path, tensors | native), WAN)


def test_redundant_layers_of_z_image_count_once(tmp_path: Path) -> None:
    attention = "layers.0.attention"
    parts: dict[str, Tensor] = {}
    for part in "qkv":
        parts |= pair(f"{attention}.to_{part}", (64, 64), ("lora.down", "lora.up"))
    fused = pair(f"{attention}.qkv", (192, 64), ("lora.down", "lora.up"))
    adapter = read(write(tmp_path, fused | parts), Z_IMAGE)
    assert set(adapter.unmatched) == set(fused)
    assert [len(deltas) for deltas in adapter.components["transformer"].values()] == [1, 1, 1]


def test_several_adapters_in_a_file(tmp_path: Path) -> None:
    tensors = pair(LAYER, (64, 64), ("lora_A.one", "lora_B.one"))
    tensors |= pair("blocks.1.attn1.to_q", (64, 64), ("lora_A.two", "lora_B.two"))
    with pytest.raises(RequestError, match="several adapters: one, two"):
        read(write(tmp_path, tensors), WAN)


def _broken() -> dict[str, tuple[dict[str, Tensor], str]]:
    low = pair(LAYER, (64, 64))
    down, up = (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight")
    loha = {f"{LAYER}.hada_w{i}_{x}": draw(4, 4) for i in (1, 2) for x in "ab"}
    return {
        "no upper factor": ({down: low[down]}, "up is missing"),
        "no lower factor": ({up: low[up]}, "down is missing"),
        "ranks differ": ({**low, up: draw(64, 5)}, "down 4x64 and up 64x5 do not make a product"),
        "rank zero": ({down: draw(0, 64), up: draw(64, 0)}, "do not make a product"),
        "vectors": ({down: draw(4), up: draw(4)}, "down is 4"),
        "integers": ({**low, up: torch.ones(64, 4, dtype=torch.int32)}, "values are torch.int32"),
        "alphas": ({**low, f"{LAYER}.alpha": draw(3)}, "alpha is 3, not one number"),
        "magnitude alone": ({f"{LAYER}.dora_scale": draw(64, 1)}, "no pair of factors"),
        "magnitude": ({**low, f"{LAYER}.dora_scale": draw(63, 1)}, "63x1 is not of 64 x 64"),
        "LoHa": ({**loha, f"{LAYER}.hada_w2_b": draw(5, 4)}, "four LoHa factors"),
        "LoHa part": ({f"{LAYER}.hada_w1_a": draw(4, 4)}, "hada_w1_b is missing"),
        "LoKr part": ({f"{LAYER}.lokr_w1": draw(4, 4)}, "lokr_w2 is needed"),
        "LoKr twice": (
            {f"{LAYER}.lokr_w1": draw(4, 4), f"{LAYER}.lokr_w1_a": draw(4, 4)},
            "lokr_w1 is needed either",
        ),
        "two methods": ({**low, **loha}, "both low rank and LoHa"),
    }


@pytest.mark.parametrize("case", list(_broken()))
def test_incomplete_layers(case: str, tmp_path: Path) -> None:
    tensors, why = _broken()[case]
    with pytest.raises(RequestError, match=why) as caught:
        read(write(tmp_path, tensors), WAN)
    assert LAYER in caught.value.message and caught.value.code == "invalid_lora"


def test_columns_of_a_fused_layer(tmp_path: Path) -> None:
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = pair(layer, (192, 64)) | {f"{layer}.dora_scale": draw(1, 64)}
    with pytest.raises(RequestError, match="DoRA over the columns of a fused layer"):
        read(write(tmp_path, tensors), FLUX)


def test_full_deltas_of_convolutions_and_biases(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.patch_embedding.diff": draw(64, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.diff_b": draw(64),
    }
    adapter = read(write(tmp_path, tensors), WAN)
    weight, bias = adapter.components["transformer"]["patch_embedding"]
    assert isinstance(weight, FullDelta) and isinstance(bias, FullDelta)
    assert weight.shape == (64, 64) and (bias.parameter, bias.shape) == ("bias", (64,))
    assert (adapter.rank, adapter.kinds, adapter.format) == (0, ("full",), "ComfyUI")


def test_a_model_without_a_table(tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn1.to_out.0"
    flat = pair("lora_unet_" + layer.replace(".", "_"), (64, 64), KOHYA, alpha=2.0)
    adapter = read(write(tmp_path, flat), "SanaTransformer2DModel")
    assert list(adapter.components["transformer"]) == [layer]
