"""Tiny Z-Image checkpoints, built once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.common import draw_weights, qwen_tokenizer, save
from tests.checkpoints.tiny_flux import small_vae


@pytest.fixture(scope="session")
def tiny_z_image_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Turbo's schedule, 4 heads of 16 channels."""
    return build(tmp_path_factory.mktemp("models") / "tiny-z-image-a")


@pytest.fixture(scope="session")
def tiny_z_image_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's schedule, 3 heads of 64 channels, one layer more."""
    folder = tmp_path_factory.mktemp("models") / "tiny-z-image-b"
    return build(folder, heads=3, axes=(16, 24, 24), layers=3, shift=6.0, seed=3)


def build(
    folder: Path,
    *,
    heads: int = 4,
    axes: tuple[int, int, int] = (4, 6, 6),
    layers: int = 2,
    shift: float = 3.0,
    seed: int = 0,
) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )
    transformer = ZImageTransformer2DModel(
        dim=heads * sum(axes),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=64,
        axes_dims=list(axes),
        axes_lens=[1024, 64, 64],
    )
    generator = torch.Generator().manual_seed(seed)
    for model in (text, transformer):
        draw_weights(model, generator)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=small_vae(scaling=0.3611, shift=0.1159),
        text_encoder=text,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return save(pipeline, folder)
