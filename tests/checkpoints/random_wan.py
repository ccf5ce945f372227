"""Builds a small Wan 2.1 text-to-video model with random weights, as repositories hold it.

Every weight is drawn so that no bias, norm or table could be dropped without changing the output,
and scaled so that latents stay of order 1 and pictures are neither flat nor saturated.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_TEXT_WIDTH = 32
_VOCABULARY = """
a the of in on at and with to from is are by over under near cat dog bird fish horse fox
owl lion tree forest flower garden grass leaf river lake sea ocean wave beach sand island
hill mountain valley snow ice rain storm cloud sky sun moon star night day morning evening
sunset light shadow fire smoke city street house castle bridge tower road train car boat
ship plane rocket robot astronaut man woman child girl boy king queen face hand eye hair
red green blue yellow orange purple pink black white gray gold silver small big old young
bright dark warm cold soft walking running flying swimming dancing sitting standing
sleeping playing eating photo painting drawing sketch oil watercolor video slow fast
motion camera zoom style beautiful detailed realistic abstract blurry low high quality
"""

# The layers that set the scale of what comes out; all others keep the variance of their input.
_GAINS = {
    "proj_out.weight": 0.3,
    "time_proj.weight": 0.5,
    "decoder.conv_out.weight": 0.35,
    # T5 does not divide its scores by the width.
    "SelfAttention.q.weight": 0.35,
    # A prompt has a few tokens among 512: without sharp scores it would not show.
    "attn2.norm_q.weight": 1.5,
    "attn2.norm_k.weight": 1.5,
    "attn2.to_out.0.weight": 1.5,
}


def build_tiny_wan(
    path: Path,
    *,
    heads: int = 4,
    head_dim: int = 16,
    layers: int = 2,
    seed: int = 0,
    flow_shift: float = 3.0,
) -> Path:
    """Write the model to the folder `path` and return it."""
    _pipeline(heads, head_dim, layers, seed, flow_shift).save_pretrained(path)
    return path


def _pipeline(heads: int, head_dim: int, layers: int, seed: int, flow_shift: float) -> Any:
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = _tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=_TEXT_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        ffn_dim=2 * heads * head_dim,
        text_dim=_TEXT_WIDTH,
    )
    vae = AutoencoderKLWan(base_dim=8)
    generator = torch.Generator().manual_seed(seed)
    for model in (text_encoder, transformer, vae):
        _draw_weights(model, generator)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
    )


def _tokenizer() -> Any:
    """Whole words where the list has them, else characters: other prompts, other tokens."""
    from transformers import T5TokenizerFast

    pieces = [(f"▁{word}", -4.0) for word in _VOCABULARY.split()]
    pieces += [(character, -9.0) for character in ("▁", *string.printable.split()[0])]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + pieces, extra_ids=0)


@torch.no_grad()
def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """New values for every parameter, in the order of their names."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(_scaled(name, noise))


def _scaled(name: str, noise: Tensor) -> Tensor:
    gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
    if "norm" in name and name.endswith(("weight", "gamma")):
        return gain * (1 + 0.1 * noise)
    if name.endswith("scale_shift_table"):
        return 0.3 * noise
    if noise.dim() < 2:
        return 0.1 * noise
    if "shared" in name or "embed_tokens" in name or "relative_attention_bias" in name:
        return noise
    taps = _window(noise.shape[2:])
    fan_in = noise.shape[1] * taps.square().sum()
    return gain * noise * taps / fan_in.sqrt()


def _window(kernel: torch.Size) -> Tensor:
    """Weights of a convolution's taps, strongest in the middle and at the present frame.

    It makes pictures soft and neighbouring frames alike.
    """
    window = torch.ones(())
    for axis, size in enumerate(kernel):
        taps = torch.tensor({1: [1.0], 2: [1.0, 1.0], 3: [0.5, 1.0, 0.5]}[size])
        if axis == 0 and len(kernel) == 3 and size == 3:
            taps = torch.tensor([0.2, 0.4, 1.0])
        window = window.unsqueeze(-1) * taps
    return window
