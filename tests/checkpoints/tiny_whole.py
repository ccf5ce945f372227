"""Tiny checkpoints of classes that have no native recipe: SDXL, SANA and LTX-Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import WORDS, clip_tokenizer, draw_weights, save, t5_tokenizer


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sana(tmp_path_factory.mktemp("models") / "tiny-sana")


@pytest.fixture(scope="session")
def tiny_ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_ltx(tmp_path_factory.mktemp("models") / "tiny-ltx")


def build_sdxl(folder: Path) -> Path:
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = clip_tokenizer()
    parts = {
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
        "text_encoder": CLIPTextModel(_clip(words)),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(words)),
        "unet": diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        ),
    }
    _draw(parts)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return save(
        diffusers.StableDiffusionXLPipeline(
            **parts, tokenizer=words, tokenizer_2=words, scheduler=scheduler
        ),
        folder,
    )


def build_sana(folder: Path) -> Path:
    import diffusers
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocab = {token: index for index, token in enumerate([*special, *(f"▁{w}" for w in WORDS)])}
    letters = [chr(code) for code in range(33, 127)]
    for letter in ["▁", *letters]:
        vocab.setdefault(letter, len(vocab))
    words = GemmaTokenizer(vocab=vocab, merges=[])
    text = Gemma2Model(
        Gemma2Config(
            vocab_size=len(vocab),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=24,
        )
    )
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=48,
        sample_size=16,  # the pipeline works at the nearest size of about 512x512
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=(*["ResBlock"] * 5, "EfficientViTBlock"),
        decoder_block_types=(*["ResBlock"] * 5, "EfficientViTBlock"),
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=(*[()] * 5, (5,)),
        decoder_qkv_multiscales=(*[()] * 5, (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    parts = {"text_encoder": text, "vae": vae, "transformer": transformer}
    _draw(parts)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    return save(diffusers.SanaPipeline(**parts, tokenizer=words, scheduler=scheduler), folder)


def build_ltx(folder: Path) -> Path:
    import diffusers
    from transformers import T5Config, T5EncoderModel

    words = t5_tokenizer()
    text = T5EncoderModel(
        T5Config(
            vocab_size=len(words),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=4,
        patch_size_t=1,
    )
    parts = {"text_encoder": text, "vae": vae, "transformer": transformer}
    _draw(parts)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    return save(diffusers.LTXPipeline(**parts, tokenizer=words, scheduler=scheduler), folder)


def _clip(words: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )


def _draw(parts: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    for model in parts.values():
        draw_weights(model, generator, SelfAttention__q__weight=0.35)
