"""From logits to tokens: one draw for every row of a step, each by its own rules and generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.base.chat import TextSampling
from sgl_diffusion.base.errors import EngineError

# Below it logits could not be divided by a temperature, and nothing but the most likely is drawn.
_COLDEST = 1e-6


@dataclass(frozen=True)
class Drawn:
    """A token, its log-probability before temperature and cuts, and the most likely ones."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Draw:
    """The draws of one row. Its generator is its own, so that others do not change its tokens."""

    def __init__(self, sampling: TextSampling, seed: int) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> Drawn:
        """`logits` are [vocabulary], fp32, on the CPU. Raises EngineError where they are not
        finite."""
        wish = self._sampling
        best, place = logits.max(dim=-1)
        if not math.isfinite(best):
            raise broken_numbers()
        if wish.temperature < _COLDEST or wish.top_k == 1:
            token = int(place)
        else:
            token = self._random(logits / wish.temperature)
        if not wish.logprobs:
            return Drawn(token)
        scores = logits.log_softmax(-1)
        values, ids = scores.topk(min(wish.top_logprobs, len(scores)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Drawn(token, float(scores[token]), top)

    def _random(self, logits: Tensor) -> int:
        wish = self._sampling
        count = min(wish.top_k or len(logits), len(logits))
        values, ids = logits.topk(count)
        chances = values.softmax(-1)
        if wish.top_p < 1.0:
            # The token that crosses the line stays, and there is one.
            before = chances.cumsum(-1) - chances
            beyond = before >= wish.top_p
            beyond[0] = False
            chances = chances.masked_fill(beyond, 0.0)
        place = torch.multinomial(chances, 1, generator=self._generator)
        return int(ids[place])


def broken_numbers() -> EngineError:
    """Of a row whose logits or samples are not finite, and would be noise."""
    return EngineError(
        "The model computed no finite numbers for this answer.",
        hint="Its weights are damaged, or too large for its precision: try --precision fp32.",
        code="numbers_broken",
    )
