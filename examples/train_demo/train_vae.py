"""Trains the VAE: pictures and short clips to latents and back."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.train_demo.muon import Both
from examples.train_demo.scenes import Scene, draw_scene, pictures
from examples.train_demo.schedule import Steps, autocast
from examples.train_demo.unrolled import decode, encode, unroll

# Width, height, frames, how many at once: about the same work each.
BATCHES = (
    (64, 64, 1, 24),
    (64, 64, 9, 6),
    (96, 96, 1, 12),
    (96, 96, 17, 2),
    (64, 64, 17, 4),
    (96, 96, 1, 12),
    (64, 64, 9, 6),
    (192, 192, 1, 3),
)
_KL = 1e-4
_SHAKE = 0.15  # of the latents' spread: the decoder forgives what the transformer gets wrong


def train_vae(vae: Any, steps: Steps, seed: int, device: torch.device) -> None:
    unroll(vae)
    chance = random.Random(seed)
    torch.manual_seed(seed)
    optimizer = Both(vae.parameters(), vae.parameters(), rate=3e-3, adam_rate=1e-3)
    turns = itertools.cycle(BATCHES)
    while not steps.over:
        clips = batch(chance, *next(turns)).to(device)
        with autocast(device):
            mean, variance = encode(vae, clips)
            latents = mean + _SHAKE * mean.detach().std() * torch.randn_like(mean)
            out = decode(vae, latents).float()
        mean, variance = mean.float(), variance.float()
        apart = out - clips
        kl = 0.5 * (mean.square() + variance.exp() - variance - 1).mean()
        loss = apart.abs().mean() + apart.square().mean() + _KL * kl
        vae.zero_grad()
        loss.backward()
        optimizer.step(steps.share(warm=0.03))
        steps.took(apart.detach().abs().mean())
    _normalise(vae, chance, device)


def trained_vae(folder: Path) -> Any:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder)
    unroll(vae)
    return vae


@torch.no_grad()
def _normalise(vae: Any, chance: random.Random, device: torch.device) -> None:
    """Write into the VAE's configuration what makes its latents of mean 0 and spread 1."""
    found = [encode(vae, batch(chance, 96, 96, 1, 64).to(device))[0] for _ in range(4)]
    found += [encode(vae, batch(chance, 96, 96, 17, 4).to(device))[0] for _ in range(8)]
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in found], dim=1)
    vae.register_to_config(
        latents_mean=flat.mean(dim=1).tolist(), latents_std=flat.std(dim=1).tolist()
    )


def batch(chance: random.Random, width: int, height: int, frames: int, count: int) -> Tensor:
    scenes = [any_scene(chance, moving=frames > 1) for _ in range(count)]
    return torch.stack([clip(scene, width, height, frames) for scene in scenes])


def any_scene(chance: random.Random, *, moving: bool) -> Scene:
    """A scene, at times in the styles that the adapters teach later."""
    scene = draw_scene(chance, moving=moving)
    style = chance.random()
    if style < 0.1:
        return Scene(**{**vars(scene), "outline": True})
    if style < 0.2:
        return Scene(**{**vars(scene), "night": True})
    return scene


def clip(scene: Scene, width: int, height: int, frames: int) -> Tensor:
    """[3, F, H, W] in -1..1."""
    return pictures(scene, width, height, frames).transpose(0, 1) * 2 - 1
