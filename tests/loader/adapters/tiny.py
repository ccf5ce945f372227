"""Tiny transformers of every family, adapter files for them, and what diffusers makes of both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import lora_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgl_diffusion.loader.adapters.families.registry import family_of
from sgl_diffusion.loader.adapters.match import match
from sgl_diffusion.loader.adapters.read import read_adapter
from sgl_diffusion.loader.adapters.types import Adapter

RANK = 4
HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}

CONFIGS: Mapping[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        **HEADS,
        "ffn_dim": 96,
        "num_layers": 2,
        "image_dim": 32,
        "added_kv_proj_dim": 64,
        "text_dim": 32,
        "freq_dim": 32,
    },
    "FluxTransformer2DModel": {
        **HEADS,
        "num_layers": 2,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
    },
    "QwenImageTransformer2DModel": {
        **HEADS,
        "num_layers": 2,
        "joint_attention_dim": 64,
        "axes_dims_rope": (4, 6, 6),
    },
    "ZImageTransformer2DModel": {
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 4,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 64, 64],
    },
    "Flux2Transformer2DModel": {
        **HEADS,
        "num_layers": 2,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 4, 4, 4),
        "joint_attention_dim": 32,
        "in_channels": 16,
    },
    "SD3Transformer2DModel": {
        **HEADS,
        "num_layers": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
        "sample_size": 16,
        "pos_embed_max_size": 16,
    },
    "SanaTransformer2DModel": {
        **HEADS,
        "num_layers": 1,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 64,
        "caption_channels": 48,
    },
    "HunyuanVideo15Transformer3DModel": {
        **HEADS,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 64,
        "text_embed_2_dim": 32,
        "image_embed_dim": 32,
        "in_channels": 9,
        "out_channels": 4,
        "rope_axes_dim": (4, 6, 6),
    },
    "LTX2VideoTransformer3DModel": {
        **HEADS,
        "num_layers": 1,
        "cross_attention_dim": 64,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 32,
        "caption_channels": 32,
    },
}

PIPELINES = {
    "WanTransformer3DModel": lora_pipeline.WanLoraLoaderMixin,
    "FluxTransformer2DModel": lora_pipeline.FluxLoraLoaderMixin,
    "QwenImageTransformer2DModel": lora_pipeline.QwenImageLoraLoaderMixin,
    "ZImageTransformer2DModel": lora_pipeline.ZImageLoraLoaderMixin,
    "Flux2Transformer2DModel": lora_pipeline.Flux2LoraLoaderMixin,
    "SD3Transformer2DModel": lora_pipeline.SD3LoraLoaderMixin,
    "SanaTransformer2DModel": lora_pipeline.SanaLoraLoaderMixin,
    "LTX2VideoTransformer3DModel": lora_pipeline.LTX2LoraLoaderMixin,
}

Table = dict[str, tuple[int, ...]]


@cache
def shapes(name: str) -> Table:
    """The parameters of a family's transformer, from its class on the meta device."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**CONFIGS[name])
    return {key: tuple(value.shape) for key, value in model.named_parameters()}


@cache
def linears(name: str) -> dict[str, tuple[int, int]]:
    """The linear layers and the size of their weights."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**CONFIGS[name])
    return {
        key: (module.out_features, module.in_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def built(name: str) -> nn.Module:
    """A transformer with drawn weights."""
    model = getattr(diffusers, name)(**CONFIGS[name])
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=index))
    return model.requires_grad_(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(
    key: str,
    size: tuple[int, int],
    names: tuple[str, str] = ("lora_A", "lora_B"),
    rank: int = RANK,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """The low-rank pair of a layer [out, in], with other values for every layer."""
    seed = sum(map(ord, key))
    tensors = {
        f"{key}.{names[0]}.weight": draw(rank, size[1], seed=seed),
        f"{key}.{names[1]}.weight": draw(size[0], rank, seed=seed + 1),
    }
    if alpha is not None:
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    name: str = "adapter.safetensors",
    metadata: dict[str, str] | None = None,
) -> Path:
    save_file(dict(tensors), folder / name, metadata=metadata)
    return folder / name


def read(path: Path, name: str, **options: Any) -> Adapter:
    return read_adapter(str(path), family_of(name, linears(name)), **options)


def merged(model: nn.Module, adapter: Adapter, name: str) -> dict[str, Tensor]:
    """The weights with our reading of the adapter."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = match(adapter, {"transformer": shapes(name)})
    assert not found.misfits and not found.unmatched and not adapter.unmatched
    for module, deltas in found.matched["transformer"].items():
        for delta in deltas:
            weight = state[f"{module}.{delta.parameter}".removeprefix(".")]
            weight += delta.delta(weight).view(weight.shape)
    return state


def merged_by_diffusers(model: nn.Module, path: Path, name: str) -> dict[str, Tensor]:
    """The weights after diffusers has loaded the file and fused it. Changes the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs: dict[str, Any] = {"weight_name": path.name, "return_lora_metadata": True}
        if name == "FluxTransformer2DModel":
            kwargs["return_alphas"] = True
        if name in PIPELINES:
            loaded = PIPELINES[name].lora_state_dict(str(path.parent), **kwargs)
        else:  # a pipeline without a loader of its own
            loaded = (load_file(path), None)
        alphas = loaded[1] if len(loaded) == 3 else None
        model.load_lora_adapter(loaded[0], network_alphas=alphas, metadata=loaded[-1])
        model.fuse_lora()
    return {
        key.replace(".base_layer", ""): value
        for key, value in model.state_dict().items()
        if ".lora_" not in key and ".lokr_" not in key
    }


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)


def check(tmp_path: Path, name: str, tensors: Mapping[str, Tensor], **header: str) -> Adapter:
    """Our reading of a file gives the weights that diffusers gives; some weight has changed."""
    path = write(tmp_path, tensors, metadata=header or None)
    adapter = read(path, name)
    model = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = merged(model, adapter, name)
    assert_same(ours, merged_by_diffusers(model, path, name))
    changed = {key for key, value in before.items() if not torch.equal(value, ours[key])}
    assert len(changed) >= sum(
        1 for key in tensors if key.endswith(("lora_A.weight", ".lora_down.weight"))
    )
    return adapter
