"""Files of each convention: the merged weights are those that diffusers' own loader gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_pipeline
from torch import Tensor

from sgl_diffusion.loader.adapters.types import LowRank
from tests.loader.adapters.tiny import CONFIGS, check, draw, linears, pair, read, write

WAN, FLUX, QWEN = "WanTransformer3DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"
Z_IMAGE, FLUX2, SD3 = "ZImageTransformer2DModel", "Flux2Transformer2DModel", "SD3Transformer2DModel"
LTX2 = "LTX2VideoTransformer3DModel"
KOHYA = ("lora_down", "lora_up")

Tensors = dict[str, Tensor]


def _all(name: str, prefix: str, **options: object) -> Tensors:
    tensors: Tensors = {}
    for layer, size in linears(name).items():
        tensors |= pair(f"{prefix}{layer}", size, **options)  # type: ignore[arg-type]
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_names(name: str, tmp_path: Path) -> None:
    adapter = check(tmp_path, name, _all(name, "transformer."))
    assert (adapter.format, adapter.rank, adapter.per_request) == ("diffusers", 4, True)
    assert adapter.layers == len(linears(name))
    assert adapter.alpha is None


def test_a_header_sets_the_alpha(tmp_path: Path) -> None:
    tensors = pair("transformer.blocks.0.attn1.to_q", (64, 64))
    tensors |= pair("transformer.blocks.1.attn1.to_q", (64, 64), rank=2)
    options = {
        "r": 4,
        "lora_alpha": 2.5,
        "rank_pattern": {"blocks.1.attn1.to_q": 2},
        "alpha_pattern": {"^blocks.1.attn1.to_q": 7},
        "use_rslora": True,
        "target_modules": ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"],
    }
    header = json.dumps({f"transformer.{key}": value for key, value in options.items()})
    adapter = check(tmp_path, WAN, tensors, lora_adapter_metadata=header)
    scales = [delta.scale for delta in adapter.deltas() if hasattr(delta, "scale")]
    assert scales == [2.5 / 2, 7 / 2**0.5]
    assert (adapter.ranks, adapter.alpha) == ((2, 4), None)


def test_alpha_tensors_beside_diffusers_names(tmp_path: Path) -> None:
    tensors = pair("transformer.transformer_blocks.0.attn.to_q", (64, 64), alpha=1.5)
    tensors |= pair("transformer.transformer_blocks.1.attn.to_q", (64, 64), alpha=0.7)
    check(tmp_path, FLUX, tensors)


# The names that lightx2v, ComfyUI and musubi use; sizes are those of the tiny model.
def _wan_native() -> dict[str, tuple[int, int]]:
    layers: dict[str, tuple[int, int]] = {}
    for i in range(2):
        for attention in ("self_attn", "cross_attn"):
            layers |= {f"blocks.{i}.{attention}.{part}": (64, 64) for part in "qkvo"}
        layers |= {f"blocks.{i}.cross_attn.{part}_img": (64, 64) for part in "kv"}
        layers |= {f"blocks.{i}.ffn.0": (96, 64), f"blocks.{i}.ffn.2": (64, 96)}
    return layers


def test_wan_lightx2v(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for index, (layer, size) in enumerate(_wan_native().items()):
        tensors |= pair(f"diffusion_model.{layer}", size, KOHYA, alpha=None)
        tensors[f"diffusion_model.{layer}.diff_b"] = draw(size[0], seed=index)
    more = {"text_embedding.0": (64, 32), "text_embedding.2": (64, 64)}
    more |= {"time_embedding.0": (64, 32), "time_embedding.2": (64, 64)}
    more |= {"time_projection.1": (384, 64), "img_emb.proj.1": (32, 32), "img_emb.proj.3": (64, 32)}
    for layer, size in more.items():
        tensors |= pair(f"diffusion_model.{layer}", size, KOHYA)
    tensors["diffusion_model.time_projection.1.diff_b"] = draw(384)
    tensors["diffusion_model.head.head.diff"] = draw(64, 64)
    tensors["diffusion_model.head.head.diff_b"] = draw(64)
    adapter = check(tmp_path, WAN, tensors)
    assert adapter.format == "lightx2v"
    assert adapter.kinds == ("full", "low rank") and not adapter.per_request


def test_wan_native_names_with_alpha(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer, size in _wan_native().items():
        tensors |= pair(f"diffusion_model.{layer}", size, alpha=2.5)
    assert check(tmp_path, WAN, tensors).alpha == 2.5


def test_wan_musubi(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for index, (layer, size) in enumerate(_wan_native().items()):
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= pair(name, size, KOHYA, rank=2 + index % 3, alpha=0.5 + index)
    adapter = check(tmp_path, WAN, tensors)
    assert (adapter.format, adapter.ranks, adapter.alpha) == ("musubi", (2, 3, 4), None)


FLUX_LAYERS = {
    "double_blocks.1.img_attn.qkv": (192, 64),
    "double_blocks.1.txt_attn.qkv": (192, 64),
    "double_blocks.1.img_attn.proj": (64, 64),
    "double_blocks.1.txt_attn.proj": (64, 64),
    "double_blocks.1.img_mlp.0": (256, 64),
    "double_blocks.1.img_mlp.2": (64, 256),
    "double_blocks.1.txt_mlp.0": (256, 64),
    "double_blocks.1.txt_mlp.2": (64, 256),
    "double_blocks.1.img_mod.lin": (384, 64),
    "double_blocks.1.txt_mod.lin": (384, 64),
    "single_blocks.0.linear2": (64, 320),
    "single_blocks.0.modulation.lin": (192, 64),
}


def test_flux_kohya(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer, size in FLUX_LAYERS.items():
        tensors |= pair("lora_unet_" + layer.replace(".", "_"), size, KOHYA, alpha=2.75)
    adapter = check(tmp_path, FLUX, tensors)
    assert (adapter.format, adapter.alpha) == ("kohya", 2.75)


def test_flux_comfyui(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer, size in FLUX_LAYERS.items():
        tensors |= pair(f"diffusion_model.{layer}", size, KOHYA, alpha=1.25)
    assert check(tmp_path, FLUX, tensors).format == "BFL"


def test_flux_xlabs(tmp_path: Path) -> None:
    layers = {
        "double_blocks.0.processor.qkv_lora1": (192, 64),
        "double_blocks.0.processor.qkv_lora2": (192, 64),
        "double_blocks.0.processor.proj_lora1": (64, 64),
        "double_blocks.0.processor.proj_lora2": (64, 64),
        "single_blocks.1.processor.qkv_lora": (192, 64),
        "single_blocks.1.processor.proj_lora": (64, 320),
    }
    tensors: Tensors = {}
    for layer, size in layers.items():
        tensors |= pair(layer, size, ("down", "up"))
    assert check(tmp_path, FLUX, tensors).format == "XLabs"


@pytest.mark.parametrize(
    ("prefix", "names", "alpha"),
    [
        ("", KOHYA, 3.5),
        ("diffusion_model.", ("lora_A", "lora_B"), None),
        ("diffusion_model.", KOHYA, 0.3),
        ("", ("lora_A.default", "lora_B.default"), None),
    ],
)
def test_qwen_image(
    prefix: str, names: tuple[str, str], alpha: float | None, tmp_path: Path
) -> None:
    tensors: Tensors = {}
    for layer, size in linears(QWEN).items():
        tensors |= pair(prefix + layer, size, names, alpha=alpha)
    check(tmp_path, QWEN, tensors)


@pytest.mark.parametrize("name", [QWEN, Z_IMAGE])
def test_flat_names_of_the_diffusers_layers(name: str, tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer, size in linears(name).items():
        if name == Z_IMAGE and ("embedder" in layer or "final" in layer):
            continue
        tensors |= pair("lora_unet_" + layer.replace(".", "_"), size, KOHYA, alpha=2.0)
    assert check(tmp_path, name, tensors).format == "kohya"


def test_z_image_dotted_and_redundant(tmp_path: Path) -> None:
    tensors: Tensors = {}
    attention = "diffusion_model.layers.1.attention"
    for part in "qkv":
        tensors |= pair(f"{attention}.to.{part}", (64, 64), ("lora.down", "lora.up"))
    tensors |= pair(f"{attention}.to_out.0", (64, 64), ("lora.down", "lora.up"))
    fused = "diffusion_model.noise_refiner.0.attention.qkv"
    tensors |= pair(fused, (192, 64), ("lora.down", "lora.up"), alpha=2.0)
    check(tmp_path, Z_IMAGE, tensors)


def _flux2_layers() -> dict[str, tuple[int, int]]:
    layers = {
        "img_in": (64, 16),
        "txt_in": (64, 32),
        "time_in.in_layer": (64, 256),
        "time_in.out_layer": (64, 64),
        "final_layer.linear": (16, 64),
    }
    for stream in ("img", "txt"):
        layers[f"double_blocks.1.{stream}_attn.qkv"] = (192, 64)
        layers[f"double_blocks.1.{stream}_attn.proj"] = (64, 64)
        layers[f"double_blocks.1.{stream}_mlp.0"] = (384, 64)
        layers[f"double_blocks.1.{stream}_mlp.2"] = (64, 192)
    return layers | {"single_blocks.0.linear1": (576, 64), "single_blocks.0.linear2": (64, 256)}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_flux2_ai_toolkit(prefix: str, tmp_path: Path) -> None:
    layers = _flux2_layers() | {
        "guidance_in.in_layer": (64, 256),
        "guidance_in.out_layer": (64, 64),
        "single_stream_modulation.lin": (192, 64),
        "double_stream_modulation_img.lin": (384, 64),
        "double_stream_modulation_txt.lin": (384, 64),
    }
    tensors: Tensors = {}
    for layer, size in layers.items():
        tensors |= pair(prefix + layer, size)
    assert check(tmp_path, FLUX2, tensors).format == "BFL"


def test_flux2_kohya(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer, size in _flux2_layers().items():
        tensors |= pair("lora_unet_" + layer.replace(".", "_"), size, KOHYA, alpha=3.0)
    check(tmp_path, FLUX2, tensors)


def test_flux2_cut_names(tmp_path: Path) -> None:
    tensors = pair("diffusion_model.sformer_blocks.0.attn.add_k_proj", (64, 64))
    tensors |= pair("diffusion_model.single_transformer_blocks.0.attn.to_out", (64, 256))
    check(tmp_path, FLUX2, tensors)


def test_ltx2_native_names(tmp_path: Path) -> None:
    layers = {
        "patchify_proj": (64, 128),
        "audio_patchify_proj": (32, 128),
        "adaln_single.linear": (384, 64),
        "audio_adaln_single.emb.timestep_embedder.linear_1": (32, 256),
        "av_ca_video_scale_shift_adaln_single.linear": (256, 64),
        "av_ca_a2v_gate_adaln_single.linear": (64, 64),
        "transformer_blocks.0.audio_to_video_attn.to_q": (32, 64),
    }
    tensors: Tensors = {}
    for layer, size in layers.items():
        tensors |= pair(f"diffusion_model.{layer}", size)
    check(tmp_path, LTX2, tensors)


@pytest.mark.parametrize("name", [Z_IMAGE, FLUX2])
@pytest.mark.parametrize("pairs", [False, True])
def test_lokr(name: str, pairs: bool, tmp_path: Path) -> None:
    layers = {
        Z_IMAGE: ["layers.0.attention.to_q", "layers.1.attention.to_out.0"],
        FLUX2: ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k"],
    }[name]
    tensors: Tensors = {}
    for index, layer in enumerate(layers):
        key = f"diffusion_model.{layer}" if name == Z_IMAGE else f"lycoris_{layer}"
        if name == FLUX2:
            key = "lycoris_" + layer.replace(".", "_")
        tensors[f"{key}.lokr_w1"] = draw(8, 8, seed=index)
        if pairs:
            tensors[f"{key}.lokr_w2_a"] = draw(8, 2, seed=index + 5)
            tensors[f"{key}.lokr_w2_b"] = draw(2, 8, seed=index + 7)
        else:
            tensors[f"{key}.lokr_w2"] = draw(8, 8, seed=index + 9)
        tensors[f"{key}.alpha"] = torch.tensor(0.5)
    adapter = check(tmp_path, name, tensors)
    assert adapter.kinds == ("LoKr",) and adapter.format.endswith("LoKr")


def test_flux_layers_that_the_loader_knows_in_one_width_only(tmp_path: Path) -> None:
    """diffusers has the rows of linear1 written into it; the products are compared on a probe."""
    width, layer = 3072, "lora_unet_single_blocks_7_linear1"
    tensors = pair(layer, (7 * width, width), KOHYA, rank=3, alpha=1.7)
    tensors |= pair("lora_unet_double_blocks_3_img_attn_qkv", (3 * width, width), KOHYA, alpha=0.5)
    # A file whose parts have ranks of their own: blocks of the upper factor, and zeros.
    sparse = "lora_unet_double_blocks_4_txt_attn_qkv"
    tensors |= pair(sparse, (3 * width, width), KOHYA, rank=6, alpha=6.0)
    blocks = tensors[f"{sparse}.lora_up.weight"].view(3, width, 3, 2)
    blocks *= torch.eye(3)[:, None, :, None]
    path = write(tmp_path, tensors)
    theirs = lora_pipeline.FluxLoraLoaderMixin.lora_state_dict(dict(tensors))
    probe = draw(width, 2)
    modules = read(path, FLUX).components["transformer"]
    assert len(modules) == 4 + 3 + 3 and len(theirs) == 2 * len(modules)
    for module, (delta,) in modules.items():
        assert isinstance(delta, LowRank)
        down, up = (theirs[f"transformer.{module}.lora_{part}.weight"] for part in "AB")
        ours = delta.scale * (delta.up @ (delta.down @ probe))
        torch.testing.assert_close(ours, up @ (down @ probe), rtol=1e-5, atol=1e-6)
