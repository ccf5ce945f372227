"""Adapters of text encoders: the merged weights are those that diffusers' loader gives."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from sgl_diffusion.loader.adapters.match import match
from tests.loader.adapters.tiny import pair, read, write

FLUX = "FluxTransformer2DModel"
LAYER = "text_model.encoder.layers.1"
LAYERS = {
    f"{LAYER}.self_attn.q_proj": (32, 32),
    f"{LAYER}.self_attn.out_proj": (32, 32),
    f"{LAYER}.mlp.fc1": (48, 32),
    f"{LAYER}.mlp.fc2": (32, 48),
}
KOHYA = ("lora_down", "lora_up")


def _clip() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def _files() -> dict[str, dict[str, Tensor]]:
    kohya, diffusers, before_peft, comfy = {}, {}, {}, {}
    for layer, size in LAYERS.items():
        kohya |= pair("lora_te1_" + layer.replace(".", "_"), size, KOHYA, alpha=1.75)
        comfy |= pair(f"text_encoders.clip_l.transformer.{layer}", size, KOHYA, alpha=0.5)
        diffusers |= pair(f"text_encoder.{layer}", size)
        old = layer.replace("q_proj", "to_q_lora").replace("out_proj", "to_out_lora")
        ends = (
            ("down", "up")
            if "attn" in layer
            else ("lora_linear_layer.down", "lora_linear_layer.up")
        )
        before_peft |= pair(f"text_encoder.{old}", size, ends)
    block = pair("lora_unet_single_blocks_0_linear2", (64, 320), KOHYA, alpha=1.0)
    return {
        "kohya": kohya | block,
        "comfyui": comfy | block,
        "diffusers": diffusers,
        "before PEFT": before_peft,
    }


@pytest.mark.parametrize("convention", list(_files()))
def test_clip(convention: str, tmp_path: Path) -> None:
    path = write(tmp_path, _files()[convention])
    model = _clip()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in before.items()}
    adapter = read(path, FLUX)
    found = match(adapter, {"text_encoder": shapes})
    assert len(found.matched["text_encoder"]) == 4 and not found.misfits
    ours = dict(before)
    for module, deltas in found.matched["text_encoder"].items():
        for delta in deltas:
            ours[f"{module}.weight"] = before[f"{module}.weight"] + delta.delta()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas = FluxLoraLoaderMixin.lora_state_dict(
            str(tmp_path), weight_name=path.name, return_alphas=True
        )
        FluxLoraLoaderMixin.load_lora_into_text_encoder(state, alphas, model, prefix="text_encoder")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    theirs = {
        key.replace(".base_layer", ""): value
        for key, value in model.state_dict().items()
        if ".lora_" not in key
    }
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)
    assert sum(not torch.equal(before[key], ours[key]) for key in before) == 4


def test_flat_names_reach_the_layers_of_t5(tmp_path: Path) -> None:
    config = T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config.feed_forward_proj = "gated-gelu"
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**{**config.to_dict(), "is_gated_act": True}))
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    tensors = {}
    for key, shape in shapes.items():
        if len(shape) == 2 and ".block." in key and "relative" not in key:
            name = "lora_te3_" + key.removesuffix(".weight").replace(".", "_")
            tensors |= pair(name, (shape[0], shape[1]), KOHYA, alpha=1.0)
    adapter = read(write(tmp_path, tensors), FLUX)
    found = match(adapter, {"text_encoder_2": shapes})
    assert found.layers == len(tensors) // 3 >= 6
    assert not found.unmatched and not found.misfits
