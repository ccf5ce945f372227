"""Tiny Stable Diffusion 3 checkpoints, built once per test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import clip_tokenizer, draw_weights, save, t5_tokenizer
from tests.checkpoints.tiny_flux import small_vae


@pytest.fixture(scope="session")
def tiny_sd3_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.5: normalised queries and keys, a second attention in the first block."""
    return build(tmp_path_factory.mktemp("models") / "tiny-sd3-a")


@pytest.fixture(scope="session")
def tiny_sd3_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.0: 2 heads of 64 channels, no norms, no T5."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3-b"
    return build(folder, heads=2, head_dim=64, dual=(), norm=None, t5=False, seed=5)


def build(
    folder: Path,
    *,
    heads: int = 4,
    head_dim: int = 16,
    dual: tuple[int, ...] = (0,),
    norm: str | None = "rms_norm",
    t5: bool = True,
    seed: int = 0,
) -> Path:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    words, long_words = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=56,
        pos_embed_max_size=12,
        dual_attention_layers=dual,
        qk_norm=norm,
    )
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(long_words),
            d_model=64,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    generator = torch.Generator().manual_seed(seed)
    clips = [_clip(words, 32, 24), _clip(words, 24, 32)]
    for model in (transformer, encoder, *clips):
        draw_weights(model, generator, SelfAttention__q__weight=0.35)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(scaling=1.5305, shift=0.0609),
        text_encoder=clips[0],
        tokenizer=words,
        text_encoder_2=clips[1],
        tokenizer_2=words,
        text_encoder_3=encoder if t5 else None,
        tokenizer_3=long_words if t5 else None,
    )
    return save(pipeline, folder)


def _clip(words: Any, width: int, projection: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=projection,
            bos_token_id=len(words) - 2,
            eos_token_id=2,  # as published: the highest id is pooled
            pad_token_id=1,
        )
    )
