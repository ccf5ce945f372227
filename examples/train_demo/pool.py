"""Scenes with their latents, made once: the transformer sees each many times, in other words."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.train_demo.scenes import Scene, sentence
from examples.train_demo.train_vae import clip
from examples.train_demo.unrolled import encode


@dataclass(frozen=True)
class Kind:
    """One size of pictures or clips: how many there are, how many are a step, how often, and how
    often in the last part, where clips are learned."""

    width: int
    height: int
    frames: int
    count: int
    at_once: int
    weight: float
    late: float = 0.0


KINDS = (
    Kind(128, 128, 1, 6000, 36, 0.52, 0.32),
    Kind(96, 96, 1, 1000, 64, 0.03, 0.02),
    Kind(128, 96, 1, 400, 48, 0.02),
    Kind(96, 128, 1, 400, 48, 0.02),
    Kind(192, 192, 1, 500, 16, 0.04, 0.02),
    Kind(256, 256, 1, 200, 9, 0.02),
    Kind(128, 128, 17, 1300, 4, 0.20, 0.42),
    Kind(128, 128, 9, 1200, 8, 0.13, 0.22),
    Kind(96, 96, 17, 200, 7, 0.02),
)

DrawScene = Callable[[random.Random, bool], Scene]


class Pool:
    def __init__(
        self,
        vae: Any,
        kinds: tuple[Kind, ...],
        draw: DrawScene,
        chance: random.Random,
        device: torch.device,
        share: float = 1.0,
    ) -> None:
        self._chance, self._device = chance, device
        self._kinds = kinds
        self._parts: list[tuple[list[Scene], Tensor]] = []
        config = vae.config
        mean, std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        for kind in kinds:
            scenes = [draw(chance, kind.frames > 1) for _ in range(max(4, int(kind.count * share)))]
            found = []
            for start in range(0, len(scenes), at := max(1, kind.at_once // 2)):
                shown = [
                    clip(s, kind.width, kind.height, kind.frames)
                    for s in scenes[start : start + at]
                ]
                with torch.no_grad():
                    found.append((encode(vae, torch.stack(shown).to(device))[0] - mean) / std)
            self._parts.append((scenes, torch.cat(found)))

    def draw(self, *, late: bool = False) -> tuple[Tensor, list[str]]:
        """Latents [B, C, T, h, w] of one size, and a sentence about each."""
        weights = [kind.late if late else kind.weight for kind in self._kinds]
        at = self._chance.choices(range(len(self._kinds)), weights)[0]
        scenes, latents = self._parts[at]
        chosen = self._chance.choices(range(len(scenes)), k=self._kinds[at].at_once)
        said = [
            "" if self._chance.random() < 0.1 else sentence(scenes[i], self._chance) for i in chosen
        ]
        return latents[chosen], said
