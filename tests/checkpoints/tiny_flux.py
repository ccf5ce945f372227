"""Tiny FLUX.1 checkpoints, built once per test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import clip_tokenizer, draw_weights, save, t5_tokenizer


@pytest.fixture(scope="session")
def tiny_flux_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dev: 4 heads of 16 channels, a guidance embedding, a shift that depends on the size."""
    return build(tmp_path_factory.mktemp("models") / "tiny-flux-a")


@pytest.fixture(scope="session")
def tiny_flux_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """schnell: 2 heads of 64 channels, no guidance embedding, no shift, one single block more."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux-b"
    return build(folder, heads=2, head_dim=64, axes=(16, 24, 24), single=3, dev=False, seed=5)


@pytest.fixture(scope="session")
def tiny_flux_fill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture without its masked part, and the mask, are channels beside the latents."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux-fill"
    return build(folder, kind="FluxFillPipeline", channels=64 + 64 + 256)


@pytest.fixture(scope="session")
def tiny_flux_control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edges or depths are channels beside the latents."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux-control"
    return build(folder, kind="FluxControlPipeline", channels=2 * 64)


@pytest.fixture(scope="session")
def tiny_flux_controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-flux-controlnet"
    return build(folder, kind="FluxControlNetPipeline", controlnet=True)


@pytest.fixture(scope="session")
def tiny_kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny-kontext", kind="FluxKontextPipeline")


def build(
    folder: Path,
    *,
    heads: int = 4,
    head_dim: int = 16,
    axes: tuple[int, int, int] = (4, 6, 6),
    single: int = 2,
    dev: bool = True,
    seed: int = 0,
    kind: str = "FluxPipeline",
    channels: int = 64,
    controlnet: bool = False,
) -> Path:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=len(clip_words) - 2,
            eos_token_id=2,  # as published: the highest id is pooled
            pad_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_words),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=channels,
        out_channels=64,
        num_layers=2,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=dev,
        axes_dims_rope=axes,
    )
    vae = small_vae(scaling=0.3611, shift=0.1159)
    generator = torch.Generator().manual_seed(seed)
    for model in (clip, t5, transformer):
        draw_weights(model, generator, SelfAttention__q__weight=0.35)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, base_shift=0.5, max_shift=1.15
    )
    parts = {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": clip,
        "tokenizer": clip_words,
        "text_encoder_2": t5,
        "tokenizer_2": t5_words,
        "transformer": transformer,
    }
    if controlnet:
        parts["controlnet"] = diffusers.FluxControlNetModel.from_transformer(
            transformer,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
        )
        draw_weights(parts["controlnet"], generator)
    return save(getattr(diffusers, kind)(**parts), folder)


def small_vae(*, scaling: float, shift: float, channels: int = 16) -> Any:
    """The image VAE of FLUX.1, SD3 and Z-Image, with few channels."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    draw_weights(vae, torch.Generator().manual_seed(0))
    return vae
