"""Trains the transformer to turn noise into latents; the text encoder stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from examples.train_demo.models import Parts, Reader, attend_plainly
from examples.train_demo.muon import Both
from examples.train_demo.pool import Pool
from examples.train_demo.schedule import Steps, autocast


def train_dit(parts: Parts, pool: Pool, steps: Steps, seed: int, *, late: bool = False) -> None:
    """`late`: from where it stands, slower, and with more of clips."""
    torch.manual_seed(seed)
    reader = Reader(parts.tokenizer, parts.text_encoder.requires_grad_(False))
    attention = attend_plainly(parts.transformer)
    for block in parts.transformer.blocks:
        block.compile(dynamic=True)
    transformer = parts.transformer
    mean = Mean(transformer)
    optimizer = Both(
        [p for p in transformer.parameters() if p.requires_grad],
        [p for p in transformer.blocks.parameters() if p.requires_grad],
        rate=3e-3,
        adam_rate=1.5e-3,
        weight_decay=0.01,
    )
    while not steps.over:
        loss = flow_loss(transformer, reader, attention, *pool.draw(late=late))
        transformer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        rate = 0.6 * steps.share(warm=0.02, fall=0.8) if late else steps.share(warm=0.02)
        optimizer.step(rate)
        mean.follow(transformer)
        steps.took(loss)
    mean.into(transformer)


def flow_loss(
    transformer: Any, reader: Reader, attention: Any, latents: Tensor, said: list[str]
) -> Tensor:
    """How far the transformer is from the way between picture and noise."""
    # Often in the middle, and at the beginning of a picture, where all of it is decided.
    sigma = torch.randn(len(latents), device=latents.device).mul(1.2).add(0.3).sigmoid()
    first = torch.rand(len(latents), device=latents.device)
    sigma = torch.where(first < 0.25, 1 - 0.32 * first, sigma)
    noise = torch.randn_like(latents)
    at = sigma.view(-1, 1, 1, 1, 1)
    with autocast(latents.device):
        tokens, attention.scores = reader(said)
        out = transformer((1 - at) * latents + at * noise, sigma * 1000, tokens).sample
    wrong = (out.float() - (noise - latents)).square().mean(dim=1)
    return (wrong * _weights(latents)).mean()


def _weights(latents: Tensor) -> Tensor:
    """A shape counts more than the plain around it, which is soon right."""
    plain = latents.flatten(2).median(dim=2).values[..., None, None, None]
    return 1 + 2 * ((latents - plain).norm(dim=1) > 1.5).float()


class Mean:
    """A running mean of the weights, which is what is kept in the end."""

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False)
        self._steps = 0

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        self._steps += 1
        keep = min(0.998, self._steps / (self._steps + 10))
        own, new = list(self._model.parameters()), list(model.parameters())
        torch._foreach_lerp_(own, new, 1 - keep)

    @torch.no_grad()
    def into(self, model: nn.Module) -> None:
        for own, new in zip(self._model.parameters(), model.parameters(), strict=True):
            new.copy_(own)
