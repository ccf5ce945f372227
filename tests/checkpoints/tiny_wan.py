"""Tiny Wan checkpoints beyond text-to-video with one transformer, built once per test session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import draw_weights, save, t5_tokenizer

Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny_wan_kind(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A folder for each key of `KINDS`, built when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def built(kind: str) -> Path:
        folder = root / kind
        return folder if folder.is_dir() else build(folder, **KINDS[kind])

    return built


KINDS: dict[str, dict[str, Any]] = {
    # Two experts; at 2 steps one each.
    "t2v-experts": {"experts": 2, "boundary": 0.875},
    "t2v-experts-64": {"experts": 2, "boundary": 0.875, "heads": 2, "head_dim": 64, "seed": 3},
    # 2.1: channels beside the latents, and the picture in the text's attention.
    "i2v": {"picture": True, "vision": True},
    "i2v-64": {"picture": True, "vision": True, "heads": 2, "head_dim": 64, "seed": 3},
    # First and last picture, told apart by a table.
    "flf2v": {"picture": True, "vision": True, "two_pictures": True, "seed": 4},
    "flf2v-64": {
        "picture": True,
        "vision": True,
        "two_pictures": True,
        "heads": 2,
        "head_dim": 64,
        "seed": 3,
    },
    "i2v-experts": {"picture": True, "experts": 2, "boundary": 0.9},
    "i2v-experts-64": {
        "picture": True,
        "experts": 2,
        "boundary": 0.9,
        "heads": 2,
        "head_dim": 64,
        "seed": 3,
    },
    # 5B: a timestep for each token, the VAE of 2.2.
    "ti2v": {"first_frame": True},
    "ti2v-64": {"first_frame": True, "heads": 2, "head_dim": 64, "seed": 3},
    # Reads videos, masks and pictures in blocks of their own; no recipe of ours.
    "vace": {"vace": True},
}
_VISION_TOKENS = 5  # 4 patches and one for the whole


def build(
    folder: Path,
    *,
    heads: int = 4,
    head_dim: int = 16,
    experts: int = 1,
    boundary: float | None = None,
    picture: bool = False,
    vision: bool = False,
    two_pictures: bool = False,
    first_frame: bool = False,
    vace: bool = False,
    seed: int = 0,
) -> Path:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    words = t5_tokenizer()
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(words),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    vae = _vae_22() if first_frame else diffusers.AutoencoderKLWan(base_dim=8)
    channels = vae.config.z_dim
    width = heads * head_dim
    kind, more = diffusers.WanTransformer3DModel, {}
    if vace:
        kind, more = (
            diffusers.WanVACETransformer3DModel,
            {"vace_layers": [0], "vace_in_channels": 96},
        )
    transformers = [
        kind(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=2,
            ffn_dim=2 * width,
            text_dim=32,
            in_channels=channels + (4 + channels if picture else 0),
            out_channels=channels,
            image_dim=32 if vision else None,
            added_kv_proj_dim=width if vision else None,
            pos_embed_seq_len=2 * _VISION_TOKENS if two_pictures else None,
            **more,
        )
        for _ in range(experts)
    ]
    generator = torch.Generator().manual_seed(seed)
    eyes = _eyes() if vision else None
    for model in (text, vae, *transformers, *([eyes] if eyes else [])):
        draw_weights(
            model,
            generator,
            SelfAttention__q__weight=0.35,
            proj_out__weight=0.3,
            time_proj__weight=0.5,
        )
    parts = {
        "tokenizer": words,
        "text_encoder": text,
        "vae": vae,
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": transformers[0],
        "transformer_2": transformers[1] if experts == 2 else None,
        "boundary_ratio": boundary,
        "expand_timesteps": first_frame,
    }
    if vace:
        del parts["expand_timesteps"]
        return save(diffusers.WanVACEPipeline(**parts), folder)
    if not picture:
        return save(diffusers.WanPipeline(**parts), folder)
    parts |= {"image_encoder": eyes, "image_processor": _preparation() if vision else None}
    return save(diffusers.WanImageToVideoPipeline(**parts), folder)


def _vae_22() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=12,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1] * 12,
        latents_std=[1.2] * 12,
    )


def _eyes() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        )
    )


def _preparation() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 28, "width": 28}
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
