"""Trains the two adapters that come with the model: contours only, and colours by moonlight."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.train_demo.models import Parts, Reader, attend_plainly
from examples.train_demo.pool import KINDS, Pool
from examples.train_demo.scenes import Scene, draw_scene
from examples.train_demo.schedule import Steps
from examples.train_demo.train_dit import flow_loss

STYLES = ("outline", "night")
_RANK = 4
# Of all blocks that learned: the first two measure places.
_LAYERS = r".*blocks\.[2-9]\.(attn\d\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"


def train_adapter(
    parts: Parts, style: str, steps: Steps, seed: int, device: torch.device, share: float
) -> Any:
    """The weights of an adapter in PEFT's format; the model's own stay as they are."""
    from peft import LoraConfig, get_peft_model_state_dict

    def draw(chance: random.Random, moving: bool) -> Scene:
        return replace(draw_scene(chance, moving=moving), **{style: True})

    chance = random.Random(seed)
    torch.manual_seed(seed)
    pool = Pool(parts.vae, KINDS, draw, chance, device, share)
    transformer = parts.transformer.requires_grad_(False)
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_LAYERS)
    transformer.add_adapter(config, adapter_name=style)
    reader = Reader(parts.tokenizer, parts.text_encoder.requires_grad_(False))
    attention = attend_plainly(transformer)
    own = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1.0, weight_decay=0.0)
    # Compiling the blocks anew with an adapter in them would take longer than these steps.
    torch.compiler.set_stance("force_eager")
    while not steps.over:
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * steps.share(warm=0.05)
        loss = flow_loss(transformer, reader, attention, *pool.draw())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.took(loss)
    torch.compiler.set_stance("default")
    weights = get_peft_model_state_dict(transformer, adapter_name=style)
    transformer.unload_lora()
    return {name: value.to(torch.bfloat16) for name, value in weights.items()}


def save_adapter(weights: Any, folder: Path, style: str) -> Path:
    from diffusers import WanPipeline

    WanPipeline.save_lora_weights(
        folder, transformer_lora_layers=weights, weight_name=f"{style}.safetensors"
    )
    return folder / f"{style}.safetensors"
