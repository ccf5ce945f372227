"""Tiny omni checkpoints of both families in the format of the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import draw_weights, qwen_tokenizer

_SPECIAL = {
    "qwen3-omni": {
        "image": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        "video": ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
        "audio": ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
    },
    "qwen2.5-omni": {
        "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
        "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
        "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    },
}
_SPEECH = ("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
_TEMPLATE = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'text' %}
{{- part.text }}
{%- elif part.type == 'image' %}
{{- 'IMAGE' }}
{%- elif part.type == 'video' %}
{{- 'VIDEO' }}
{%- elif part.type == 'audio' %}
{{- 'AUDIO' }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}


@pytest.fixture(scope="session")
def tiny_qwen3_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3-omni")


@pytest.fixture(scope="session")
def tiny_qwen25_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen25(tmp_path_factory.mktemp("models") / "tiny-qwen2.5-omni")


@pytest.fixture(scope="session")
def qwen3_of_transformers(tiny_qwen3_omni: Path) -> Any:
    """The whole model as transformers has it; leave it as it is."""
    from transformers import Qwen3OmniMoeForConditionalGeneration

    return Qwen3OmniMoeForConditionalGeneration.from_pretrained(tiny_qwen3_omni).eval()


@pytest.fixture(params=["qwen3-omni", "qwen2.5-omni"])
def tiny_omni(request: pytest.FixtureRequest) -> Path:
    """Each family in its turn."""
    name = {"qwen3-omni": "tiny_qwen3_omni", "qwen2.5-omni": "tiny_qwen25_omni"}[request.param]
    folder: Path = request.getfixturevalue(name)
    return folder


def build_qwen3(folder: Path, *, seed: int = 0, width: int = 64, layers: int = 3) -> Path:
    """Wider and deeper ones are for benchmarks."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    tokenizer = _tokenizer("qwen3-omni")
    ids = _ids(tokenizer, "qwen3-omni")
    rope = {**_ROPE, "interleaved": True, "mrope_interleaved": True}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width // 2,
    }
    heads = {
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "head_dim": 16,
    }
    spoken = width * 3 // 4
    shared = {
        key: ids[key]
        for key in (
            "audio_token_id",
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "audio_start_token_id",
        )
    }
    thinker = {
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "n_window": 50,
            "n_window_infer": 100,
            "output_dim": width,
            "downsample_hidden_size": 16,
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": width,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": width * 3 // 2,
            "num_hidden_layers": layers,
            "rope_parameters": rope,
            **heads,
            **experts,
        },
        "user_token_id": ids["user_token_id"],
        **shared,
        "vision_end_token_id": ids["vision_end_token_id"],
        "audio_end_token_id": ids["audio_end_token_id"],
    }
    talker = {
        "text_config": {
            "vocab_size": 1200,
            "hidden_size": spoken,
            "intermediate_size": width,
            "shared_expert_intermediate_size": width // 2,
            "num_hidden_layers": max(layers // 2, 2),
            "rope_parameters": rope,
            **heads,
            **experts,
        },
        "code_predictor_config": {
            "vocab_size": 128,
            "hidden_size": spoken,
            "intermediate_size": width,
            "num_hidden_layers": 2,
            "num_code_groups": 4,
            **heads,
        },
        "num_code_groups": 4,
        "thinker_hidden_size": width,
        "accept_hidden_layer": 1,
        "spatial_merge_size": 2,
        "codec_eos_token_id": 1190,
        "codec_nothink_id": 1191,
        "codec_think_bos_id": 1192,
        "codec_think_eos_id": 1193,
        "codec_pad_id": 1194,
        "codec_bos_id": 1195,
        "speaker_id": {"ethan": 1180, "chelsie": 1181},
        **shared,
    }
    code2wav = {
        "codebook_size": 1200,
        "hidden_size": width // 2,
        "intermediate_size": width,
        "num_hidden_layers": max(layers // 2, 2),
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "num_quantizers": 4,
        "decoder_dim": max(width // 2, 64),
    }
    config = Qwen3OmniMoeConfig(
        thinker_config=thinker,
        talker_config=talker,
        code2wav_config=code2wav,
        **{name: value for name, value in ids.items() if name.startswith(("im_", "tts_"))},
        **{f"{role}_token_id": ids[f"{role}_token_id"] for role in ("system", "user", "assistant")},
    )
    model = Qwen3OmniMoeForConditionalGeneration(config)
    return _save(folder, model, tokenizer, seed, patch=16)


def build_qwen25(folder: Path, *, seed: int = 0) -> Path:
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    tokenizer = _tokenizer("qwen2.5-omni")
    ids = _ids(tokenizer, "qwen2.5-omni")
    shared = {
        "audio_token_index": ids["audio_token_id"],
        "image_token_index": ids["image_token_id"],
        "video_token_index": ids["video_token_id"],
        "vision_start_token_id": ids["vision_start_token_id"],
        "vision_end_token_id": ids["vision_end_token_id"],
        "audio_start_token_id": ids["audio_start_token_id"],
        "audio_end_token_id": ids["audio_end_token_id"],
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": _ROPE,
    }
    thinker = {
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "n_window": 50,
            "output_dim": 64,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        "text_config": {**text, "vocab_size": len(tokenizer), "tie_word_embeddings": False},
        "user_token_id": ids["user_token_id"],
        **shared,
    }
    talker = {
        **text,
        **shared,
        "head_dim": 16,
        "vocab_size": 200,
        "embedding_size": 64,
        "tts_text_start_token_id": ids["tts_bos_token_id"],
        "tts_text_end_token_id": ids["tts_eos_token_id"],
        "tts_text_pad_token_id": ids["tts_pad_token_id"],
        "tts_codec_start_token_id": 193,
        "tts_codec_end_token_id": 194,
        "tts_codec_pad_token_id": 192,
        "tts_codec_mask_token_id": 196,
    }
    token2wav = {
        "dit_config": {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "head_dim": 16,
            "emb_dim": 16,
            "block_size": 4,
            "look_ahead_layers": [2],
            "look_backward_layers": [0, 3],
            "num_embeds": 193,
            "enc_emb_dim": 16,
            "enc_dim": 16,
            "enc_channels": [16, 16, 16, 16, 48],
            "enc_attention_channels": 8,
            "enc_se_channels": 8,
        },
        "bigvgan_config": {
            "upsample_initial_channel": 32,
            "upsample_rates": [8, 6, 5],
            "upsample_kernel_sizes": [16, 12, 11],
            "resblock_kernel_sizes": [3, 7],
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
        },
    }
    config = Qwen2_5OmniConfig(
        thinker_config=thinker, talker_config=talker, token2wav_config=token2wav
    )
    model = Qwen2_5OmniForConditionalGeneration(config)
    _save(folder, model, tokenizer, seed, patch=14)
    generator = torch.Generator().manual_seed(seed + 1)
    voices = {
        name: {
            "bos_token": 190 + index,
            "cond": torch.randn(1, 16, generator=generator),
            "ref_mel": torch.randn(1, 30, 80, generator=generator),
        }
        for index, name in enumerate(("Chelsie", "Ethan"))
    }
    torch.save(voices, folder / "spk_dict.pt")
    return folder


def _tokenizer(family: str) -> Any:
    marks = _SPECIAL[family]
    words = [word for three in marks.values() for word in three]
    roles = ("system", "user", "assistant")
    tokenizer = qwen_tokenizer(*dict.fromkeys(words), *_SPEECH)
    tokenizer.add_tokens(list(roles))
    template = _TEMPLATE
    for kind, three in marks.items():
        template = template.replace(f"'{kind.upper()}'", repr("".join(three)))
    tokenizer.chat_template = template
    return tokenizer


def _ids(tokenizer: Any, family: str) -> dict[str, int]:
    marks = _SPECIAL[family]
    pad, bos, eos = _SPEECH
    names = {
        "im_start_token_id": "<|im_start|>",
        "im_end_token_id": "<|im_end|>",
        "tts_pad_token_id": pad,
        "tts_bos_token_id": bos,
        "tts_eos_token_id": eos,
        "vision_start_token_id": marks["image"][0],
        "vision_end_token_id": marks["image"][2],
        "audio_start_token_id": marks["audio"][0],
        "audio_end_token_id": marks["audio"][2],
        **{f"{kind}_token_id": three[1] for kind, three in marks.items()},
        **{f"{role}_token_id": role for role in ("system", "user", "assistant")},
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _save(folder: Path, model: Any, tokenizer: Any, seed: int, *, patch: int) -> Path:
    import json

    from transformers import WhisperFeatureExtractor
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as preparation
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Answers that vary, and sound that is not cut off at full loudness.
    gains = {
        "thinker__lm_head__weight": 4.0,
        "code2wav__decoder__6__conv__weight": 0.005,
        "token2wav__code2wav_bigvgan_model__conv_post__weight": 0.005,
    }
    draw_weights(model, torch.Generator().manual_seed(seed), **gains)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    eyes = preparation.Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    )
    ears = WhisperFeatureExtractor(feature_size=128)
    values = {**ears.to_dict(), **eyes.to_dict(), "feature_extractor_type": type(ears).__name__}
    (folder / "preprocessor_config.json").write_text(json.dumps(values, default=str))
    return folder
