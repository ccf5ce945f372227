"""The memory that loading takes is that of the weights, whatever their precision on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.own_process import found_by

# What a first load takes besides: code of libraries, headers, the buffers of the threads that read.
FLOOR = 48 << 20


@torch.no_grad()
def write(folder: Path, stored: torch.dtype, scale: int) -> None:
    """Random weights in shards; `scale` 1 is some 50 million of them."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(
            num_layers=4 * scale, num_single_layers=4 * scale, num_attention_heads=4
        )
    save(model, folder, stored)


@torch.no_grad()
def write_text_encoder(folder: Path, stored: torch.dtype, scale: int) -> None:
    """Random weights of a T5 in shards; `scale` 1 is some 50 million of them."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=12 * scale,
        num_heads=8,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model: Any = T5EncoderModel(config)
    save(model, folder, stored)


@torch.no_grad()
def write_vae(folder: Path, stored: torch.dtype, scale: int) -> None:
    """Random weights of a VAE; `scale` 1 is some 60 million of them or more."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(512, 1024),
            layers_per_block=scale,
        )
    save(model, folder, stored)


@torch.no_grad()
def write_vision(folder: Path, stored: torch.dtype, scale: int) -> None:
    """Random weights of what sees pictures; `scale` 1 is some 50 million of them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=4 * scale,
    )
    with torch.device("meta"):
        model: Any = CLIPVisionModel(config)
    save(model, folder, stored)


def save(model: Any, folder: Path, stored: torch.dtype) -> None:
    model = model.to(stored).to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    block = torch.randn(1 << 20).to(stored)  # again and again: drawing a gigabyte takes minutes
    for parameter in model.parameters():
        for part in parameter.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    model.save_pretrained(folder, max_shard_size="150MB")


def ratio(kind: str, folder: Path, dtype: str, least: int) -> float:
    found = found_by("tests.loader.peak_of", kind, str(folder), dtype)
    assert found["size"] >= least, found
    return float((found["peak"] - FLOOR) / found["size"])


WRITERS = {
    "transformer": write,
    "text_encoder": write_text_encoder,
    "vae": write_vae,
    "vision": write_vision,
}
QUICK = ("transformer", "text_encoder")  # of a VAE: tests/components/test_pretrained.py
CASES = [
    (torch.float32, "float32", 6),
    (torch.bfloat16, "bfloat16", 12),
    (torch.float16, "float32", 6),
    (torch.float32, "bfloat16", 12),
    (torch.bfloat16, "float32", 6),
]


@pytest.mark.parametrize("kind", QUICK)
def test_loading_takes_the_size_of_the_weights(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path, torch.bfloat16, scale=1)
    assert ratio(kind, tmp_path, "float32", least=200_000_000) <= 1.15


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.parametrize(("stored", "wanted", "scale"), CASES)
def test_loading_a_gigabyte(
    kind: str, stored: torch.dtype, wanted: str, scale: int, tmp_path: Path
) -> None:
    WRITERS[kind](tmp_path, stored, scale)
    assert ratio(kind, tmp_path, wanted, least=1_000_000_000) <= 1.15
