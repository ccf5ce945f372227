"""Trains the text encoder to understand: every token of a sentence comes to say what the whole
scene is like. The transformer then has to learn to draw, and not to read, too."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from examples.train_demo.beginning import SAID
from examples.train_demo.models import TEXT_WIDTH
from examples.train_demo.muon import Both
from examples.train_demo.scenes import (
    COLOURS,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    sentence,
)
from examples.train_demo.schedule import Steps

_AT_ONCE = 96
_ASKED: dict[str, tuple[str | None, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "motion": (None, *MOTIONS),
}


def train_text(tokenizer: Any, encoder: Any, steps: Steps, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    heads = nn.ModuleDict(
        {name: nn.Linear(TEXT_WIDTH, len(kinds)) for name, kinds in _ASKED.items()}
    ).to(device)
    both = nn.ModuleList([encoder, heads])
    optimizer = Both(
        both.parameters(), encoder.encoder.block.parameters(), rate=3e-3, adam_rate=2e-3
    )
    while not steps.over:
        scenes = [draw_scene(chance, moving=chance.random() < 0.3) for _ in range(_AT_ONCE)]
        said = [sentence(scene, chance) for scene in scenes]
        read = tokenizer(said, padding=True, return_tensors="pt").to(device)
        hidden = encoder(**read).last_hidden_state
        mask = read["attention_mask"]
        loss = torch.stack(
            [_wrong(head(hidden), mask, _answers(scenes, name)) for name, head in heads.items()]
        ).sum()
        far = (hidden[..., : len(SAID)] - _numbers(scenes).to(device)).square().sum(dim=-1)
        loss = loss + 2 * (far * mask).sum() / mask.sum()
        both.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(steps.share(warm=0.05))
        steps.took(loss)


def _numbers(scenes: list[Scene]) -> torch.Tensor:
    """[B, 1, 5]: what the first numbers of every token are to say, see `SAID`."""
    sizes = list(SIZES)
    told = [
        (
            *((0, 0) if scene.motion else PLACES[scene.place]),
            sizes.index(scene.size) - 1,
            *(MOTIONS[scene.motion] if scene.motion else (0, 0)),
        )
        for scene in scenes
    ]
    return torch.tensor(told, dtype=torch.float32)[:, None]


def _answers(scenes: list[Scene], name: str) -> list[int]:
    """What the scene is like, as a number; -1 where that says nothing about a picture."""
    asked = _ASKED[name]
    return [
        -1 if name == "place" and scene.motion else asked.index(getattr(scene, name))
        for scene in scenes
    ]


def _wrong(guess: torch.Tensor, mask: torch.Tensor, answers: list[int]) -> torch.Tensor:
    """Mean over the real tokens [B, L] of what each one's `guess` [B, L, kinds] lacks."""
    wanted = torch.tensor(answers, device=guess.device)[:, None].expand(mask.shape)
    wanted = wanted.masked_fill(mask == 0, -1)
    return F.cross_entropy(guess.flatten(0, 1), wanted.flatten(), ignore_index=-1)
