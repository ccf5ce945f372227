"""Trains the transformer, and the text encoder with it, to turn noise into latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from examples.train_demo.models import Parts, Reader, attend_to_text
from examples.train_demo.pool import Pool
from examples.train_demo.schedule import Clock, autocast

_REST_RATE = 1.5e-3
_MATRIX_RATE = 3e-3


def train_dit(
    parts: Parts, pool: Pool, clock: Clock, seed: int, note: Callable[[str], None]
) -> None:
    torch.manual_seed(seed)
    reader = Reader(parts.tokenizer, parts.text_encoder)
    attention = attend_to_text(parts.transformer)
    both = nn.ModuleList([parts.transformer, parts.text_encoder])
    mean = Mean(both)
    optimizers = _optimizers(parts)
    step = 0
    while not clock.over:
        rate = clock.rate(1.0, warm=0.02)
        for optimizer, most in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * most
        loss = flow_loss(parts.transformer, reader, attention, *pool.draw())
        both.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        mean.follow(both)
        step += 1
        if step % 100 == 0:
            note(f"transformer step {step} {clock.done:.0%} loss {loss.item():.4f}")
    mean.into(both)


def flow_loss(
    transformer: Any, reader: Reader, attention: Any, latents: Tensor, said: list[str]
) -> Tensor:
    """How far the transformer is from the way between picture and noise."""
    # More often in the middle, where what the picture shows is decided.
    sigma = torch.randn(len(latents), device=latents.device).mul(1.2).add(0.3).sigmoid()
    noise = torch.randn_like(latents)
    at = sigma.view(-1, 1, 1, 1, 1)
    with autocast(latents.device):
        tokens, attention.scores = reader(said)
        out = transformer((1 - at) * latents + at * noise, sigma * 1000, tokens).sample
    return (out.float() - (noise - latents)).square().mean()


def _optimizers(parts: Parts) -> list[tuple[torch.optim.Optimizer, float]]:
    """Orthogonal updates for the matrices of the blocks, Adam for everything else."""
    matrices = [p for p in parts.transformer.blocks.parameters() if p.dim() == 2]
    taken = {id(p) for p in matrices}
    every: Iterable[nn.Parameter] = (
        *parts.transformer.parameters(),
        *parts.text_encoder.parameters(),
    )
    rest = [p for p in every if id(p) not in taken]
    muon = torch.optim.Muon(
        matrices, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    adam = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, _MATRIX_RATE), (adam, _REST_RATE)]


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
