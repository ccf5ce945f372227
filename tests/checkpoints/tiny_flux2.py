"""Tiny FLUX.2 checkpoints, built once per test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import draw_weights, qwen_tokenizer, save

_MISTRAL_CHAT = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role }}
{%- for part in message.content %}{{- part.text }}{%- endfor %}
{{- '<|im_end|>' }}
{%- endfor %}"""


@pytest.fixture(scope="session")
def tiny_flux2_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads of 16 channels, a guidance embedding, Mistral 3."""
    return build(tmp_path_factory.mktemp("models") / "tiny-flux2-dev")


@pytest.fixture(scope="session")
def tiny_flux2_klein_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 heads of 64 channels, guidance in a second pass, Qwen3."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux2-klein-base"
    return build(folder, heads=2, axes=(16, 16, 16, 16), single=3, klein=True, seed=5)


@pytest.fixture(scope="session")
def tiny_flux2_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled: no guidance at all."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux2-klein"
    return build(folder, klein=True, distilled=True, seed=6)


def build(
    folder: Path,
    *,
    heads: int = 4,
    axes: tuple[int, int, int, int] = (4, 4, 4, 4),
    single: int = 2,
    klein: bool = False,
    distilled: bool = False,
    seed: int = 0,
) -> Path:
    import diffusers

    tokenizer = qwen_tokenizer()
    text = _qwen(tokenizer) if klein else _mistral(tokenizer)
    if not klein:
        tokenizer.chat_template = _MISTRAL_CHAT
        tokenizer.padding_side = "left"
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=single,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=3 * 32,
        axes_dims_rope=axes,
        guidance_embeds=not klein,
    )
    vae = _vae()
    generator = torch.Generator().manual_seed(seed)
    for model in (text, transformer, vae):
        draw_weights(model, generator)
    vae.bn.running_mean.copy_(0.2 * torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(1 + torch.rand(16, generator=generator))
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
        "text_encoder": text,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    if klein:
        return save(diffusers.Flux2KleinPipeline(**parts, is_distilled=distilled), folder)
    return save(diffusers.Flux2Pipeline(**parts), folder)


def _qwen(tokenizer: Any) -> Any:
    """As deep as the layers that FLUX.2 klein reads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
        )
    )


def _mistral(tokenizer: Any) -> Any:
    """As deep as the layers that FLUX.2 dev reads, beside eyes that nobody uses."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "head_dim": 16,
                "image_size": 28,
                "patch_size": 14,
            },
        )
    )


def _vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
