"""Tiny Z-Image checkpoints, built once per test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import draw_weights, qwen_tokenizer, save
from tests.checkpoints.tiny_flux import small_vae

VISION = ("<|vision_start|>", "<|vision_end|>")


@pytest.fixture(scope="session")
def tiny_z_image_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Turbo's schedule, 4 heads of 16 channels."""
    return build(tmp_path_factory.mktemp("models") / "tiny-z-image-a")


@pytest.fixture(scope="session")
def tiny_z_image_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's schedule, 3 heads of 64 channels, one layer more."""
    folder = tmp_path_factory.mktemp("models") / "tiny-z-image-b"
    return build(folder, heads=3, axes=(16, 24, 24), layers=3, shift=6.0, seed=3)


@pytest.fixture(scope="session")
def tiny_z_image_omni_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's schedule, 4 heads of 16 channels, a vision model beside the text's."""
    folder = tmp_path_factory.mktemp("models") / "tiny-z-image-omni-a"
    return build(folder, shift=6.0, seed=5, omni=True)


@pytest.fixture(scope="session")
def tiny_z_image_omni_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 heads of 64 channels, one layer more."""
    folder = tmp_path_factory.mktemp("models") / "tiny-z-image-omni-b"
    return build(folder, heads=3, axes=(16, 24, 24), layers=3, shift=6.0, seed=6, omni=True)


def build(
    folder: Path,
    *,
    heads: int = 4,
    axes: tuple[int, int, int] = (4, 6, 6),
    layers: int = 2,
    shift: float = 3.0,
    seed: int = 0,
    omni: bool = False,
) -> Path:
    import diffusers
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer(*(VISION if omni else ()))
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
    transformer = diffusers.ZImageTransformer2DModel(
        dim=heads * sum(axes),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=64,
        axes_dims=list(axes),
        axes_lens=[1024, 64, 64],
        siglip_feat_dim=48 if omni else None,
    )
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        "vae": small_vae(scaling=0.3611, shift=0.1159),
        "text_encoder": text,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    generator = torch.Generator().manual_seed(seed)
    for model in (text, transformer):
        draw_weights(model, generator)
    if not omni:
        return save(diffusers.ZImagePipeline(**parts), folder)
    parts |= {"siglip": _eyes(generator), "siglip_processor": _preparation()}
    return save(diffusers.ZImageOmniPipeline(**parts), folder)


def _eyes(generator: torch.Generator) -> Any:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    model = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_patches=16,
            patch_size=16,
            vision_use_head=False,
        )
    )
    draw_weights(model, generator)
    return model


def _preparation() -> Any:
    """Pictures become at most 24 patches of 16x16."""
    from transformers.models.siglip2 import image_processing_pil_siglip2 as preparation

    return preparation.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=24)
