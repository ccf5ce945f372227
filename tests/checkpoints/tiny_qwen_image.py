"""Tiny Qwen-Image checkpoints, built once per test session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.common import draw_weights, qwen_tokenizer, save

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@pytest.fixture(scope="session")
def tiny_qwen_image_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads of 16 channels."""
    return build(tmp_path_factory.mktemp("models") / "tiny-qwen-image-a")


@pytest.fixture(scope="session")
def tiny_qwen_image_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 heads of 64 channels, one layer more, a schedule without an end."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen-image-b"
    return build(folder, heads=2, axes=(16, 24, 24), layers=3, terminal=None, seed=4)


def build(
    folder: Path,
    *,
    heads: int = 4,
    axes: tuple[int, int, int] = (4, 6, 6),
    layers: int = 2,
    terminal: float | None = 0.02,
    zero_cond_t: bool = False,
    seed: int = 0,
    kind: str = "QwenImagePipeline",
) -> Path:
    import diffusers

    tokenizer = qwen_tokenizer(*VISION)
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=64,
        axes_dims_rope=axes,
        zero_cond_t=zero_cond_t,
    )
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8)
    text = _text_encoder(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    for model in (text, transformer, vae):
        draw_weights(model, generator)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=terminal,
    )
    parts = {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": text,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    if "Edit" in kind:
        parts["processor"] = None  # transformers makes one only beside torchvision
    path = save(getattr(diffusers, kind)(**parts), folder)
    if "Edit" in kind:
        _add_processor(path)
    return path


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = {name: tokenizer.convert_tokens_to_ids(name) for name in VISION}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=words["<|vision_start|>"],
        vision_end_token_id=words["<|vision_end|>"],
        image_token_id=words["<|image_pad|>"],
        video_token_id=words["<|video_pad|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _add_processor(path: Path) -> None:
    """The files that a repository has for pictures."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as preparation

    preparation.Qwen2VLImageProcessorPil().save_pretrained(path / "processor")
    index = path / "model_index.json"
    values = json.loads(index.read_text())
    values["processor"] = ["transformers", "Qwen2VLProcessor"]
    index.write_text(json.dumps(values))
