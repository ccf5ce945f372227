"""Which components stay away, so that a model and its jobs fit into a budget. Numbers only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sgl_diffusion.base.config import EngineOptions

# What each way costs, as an order: a text encoder works once a prompt, a VAE once a picture, tiles
# change pixels a little, and a transformer is brought again in every step.
TEXT, VAE, DIT = "text_encoder_cpu_offload", "vae_cpu_offload", "dit_layerwise_offload"
_COSTS = {TEXT: 1, VAE: 2, DIT: 12}
_TILE_COST = 4


def asked(options: EngineOptions) -> tuple[str, ...]:
    """The offloads that the operator names."""
    return tuple(name for name in (DIT, TEXT, VAE) if getattr(options, name))


def flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


@dataclass(frozen=True)
class Part:
    """A component: bytes as a whole, and with its option; None where there is no such option."""

    option: str | None
    whole: int
    offloaded: int


@dataclass(frozen=True)
class Choice:
    """Options that are on, and the edge of tiles (0: frames are decoded whole); `model` and `job`
    are the bytes that it takes."""

    options: tuple[str, ...]
    tile_edge: int
    model: int
    job: float

    @property
    def need(self) -> float:
        return self.model + self.job


Job = Callable[[int], float]  # bytes of a job whose frames are decoded in tiles of this edge


def choose(
    parts: Sequence[Part], forced: Sequence[str], tiles: Sequence[int], job: Job, most: float
) -> Choice | None:
    """The cheapest way that fits; None if there is none."""
    found = (way for way in ways(parts, forced, tiles, job) if way.need <= most)
    return next(found, None)


def ways(
    parts: Sequence[Part], forced: Sequence[str], tiles: Sequence[int], job: Job
) -> list[Choice]:
    """All of them, the cheapest first; `tiles` are edges in the order in which they are liked."""
    there = {part.option for part in parts if part.option is not None}
    free = [option for option in _COSTS if option in there and option not in forced]
    found: list[tuple[int, Choice]] = []
    for count in range(len(free) + 1):
        for more in itertools.combinations(free, count):
            options = tuple(option for option in _COSTS if option in (*forced, *more))
            model = model_bytes(parts, options)
            for place, edge in enumerate(tiles):
                cost = sum(_COSTS[option] for option in more) + (_TILE_COST + place if place else 0)
                found.append((cost, Choice(options, edge, model, job(edge))))
    return [way for _, way in sorted(found, key=lambda pair: pair[0])]


def model_bytes(parts: Sequence[Part], options: Sequence[str]) -> int:
    return sum(part.offloaded if part.option in options else part.whole for part in parts)
