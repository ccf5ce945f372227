"""What keys mean, whatever stands around the layer's name."""

from __future__ import annotations

import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.families.sd3 import SD3
from sgl_diffusion.loader.adapters.families.wan import WAN
from sgl_diffusion.loader.adapters.keys import Key, parse, shown, some

TRANSFORMER = [
    ("transformer.a.0.b.lora_A.weight", Key("transformer", "a.0.b", "down", prefix="transformer.")),
    ("diffusion_model.a.b.lora_down.weight", "down"),
    ("model.diffusion_model.a.b.lora_up.weight", "up"),
    ("base_model.model.a.b.lora_B.weight", "up"),
    ("base_model.model.transformer.a.b.lora_B.weight", "up"),
    ("a.b.lora.down.weight", "down"),
    ("unet.a.b.lora_linear_layer.up.weight", "up"),
    ("a.b.lora_B.bias", "up_bias"),
    ("a.b.alpha", "alpha"),
    ("a.b.dora_scale", "magnitude"),
    ("a.b.lora_magnitude_vector", "magnitude"),
    ("a.b.lora_magnitude_vector.weight", "magnitude"),
    ("a.b.diff", "diff"),
    ("a.b.w_norm", "diff"),
    ("a.b.diff_b", "diff_b"),
    ("a.b.hada_w2_b", "hada_w2_b"),
    ("a.b.lokr_w1", "lokr_w1"),
    ("a.b.lokr_w1_a", "lokr_w1_a"),
]


@pytest.mark.parametrize(("text", "expected"), TRANSFORMER)
def test_dotted_keys(text: str, expected: Key | str) -> None:
    key = parse(text, {})
    assert key is not None
    if isinstance(expected, Key):
        assert key == expected
    else:
        assert (key.component, key.layer, key.part, key.flat) == (
            "transformer",
            "a.b",
            expected,
            False,
        )


def test_slots() -> None:
    for text in ("a.lora_A.default.weight", "a.lora_magnitude_vector.default.weight"):
        key = parse(f"base_model.model.{text}", {})
        assert key is not None and (key.layer, key.slot) == ("a", "default")


@pytest.mark.parametrize(
    ("text", "component", "layer"),
    [
        ("lora_unet_a_b.lora_down.weight", "transformer", "a_b"),
        ("lora_transformer_a_b.lora_down.weight", "transformer", "a_b"),
        ("lycoris_a_b.lokr_w2", "transformer", "a_b"),
        ("lora_te_a_b.alpha", "text_encoder", "a_b"),
        ("lora_te1_a_b.alpha", "text_encoder", "a_b"),
        ("lora_te2_a_b.alpha", "text_encoder_2", "a_b"),
    ],
)
def test_flat_keys(text: str, component: str, layer: str) -> None:
    key = parse(text, {})
    assert key is not None and (key.component, key.layer, key.flat) == (component, layer, True)


def test_prefixes_of_a_family() -> None:
    cases = [
        ("high_noise_model.blocks.0.ffn.0.diff", WAN, "transformer"),
        ("low_noise_model.blocks.0.ffn.0.diff", WAN, "transformer_2"),
        ("transformer_2.blocks.0.ffn.0.diff", WAN, "transformer_2"),
        ("lora_te3_a.alpha", SD3, "text_encoder_3"),
        ("text_encoders.clip_g.transformer.a.alpha", SD3, "text_encoder_2"),
    ]
    for text, family, component in cases:
        key = parse(text, family.prefixes)
        assert key is not None and key.component == component
        assert "." not in key.layer or key.layer.startswith("blocks.")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a.hada_t1", "Tucker"),
        ("a.lora_mid.weight", "Tucker"),
        ("a.oft_blocks", "OFT"),
        ("a.boft_R", "BOFT"),
        ("a.b1.weight", "GLoRA"),
        ("a.ia3_l", "IA3"),
        ("a.lora_E", "AdaLoRA"),
        ("a.lora_embedding_A", "embedding table"),
        ("a.scalar", "trained scalar"),
        ("a.set_weight", "replace"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "FLUX control LoRA"),
        ("a.lora_A.bias", "bias inside"),
        ("a.weight", "whole weights"),
        ("a.modules_to_save.default.weight", "whole weights"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(text: str, what: str) -> None:
    with pytest.raises(RequestError, match=what) as caught:
        parse(text, {})
    assert caught.value.code == "invalid_lora" and text in caught.value.message


def test_an_unknown_end_is_no_key() -> None:
    assert parse("a.b.step", {}) is None
    assert parse("a.b.lora_A.weight\n", {}) is None


def test_names_of_a_file_are_shown_in_one_short_line() -> None:
    assert shown("a\nb\x1b[31m") == "a?b?[31m"
    assert len(shown("x" * 9999)) == 120
    assert some(["a", "b", "c"], 2) == "a, b and 1 more"
