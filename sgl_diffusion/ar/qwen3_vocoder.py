"""Codes to sound as they come: Qwen3's code2wav with carried state, equal to one whole decode.

The transformer keeps its window of keys and values. The convolutions behind it look back a fixed
number of frames, so each piece is decoded with that many states before it, and the samples that
were sent already are cut off by their index in the whole. The upsamplers look one step ahead: the
last samples of a piece come with the next one, and those of the last piece never, as in the model's
own decode.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def frames_back(config: Any) -> int:
    """How many frames before its own the convolutions use for a sample."""
    rate, back = 1, 0.0
    for factor in config.upsampling_ratios:
        rate *= factor
        back += 6 / rate
    back += 6 / rate
    for factor in config.upsample_rates:
        # Two inputs a sample, and the three residual units with their dilations.
        back += 2 / rate
        rate *= factor
        back += 6 * (1 + 3 + 9) / rate
    return math.ceil(back + 6 / rate) + 1


class Qwen3Vocoder:
    def __init__(self, model: Any, voices: tuple[str, ...]) -> None:
        self.model = model
        self.voices = voices
        self.groups = int(model.config.num_quantizers)
        self.back = frames_back(model.config)
        self.samples_per_frame = int(model.total_upsample)

    def stream(self, voice: str, seed: int) -> Qwen3Stream:
        """The codes say whose voice it is."""
        return Qwen3Stream(self)


class Qwen3Stream:
    """The sound of one answer."""

    def __init__(self, vocoder: Qwen3Vocoder) -> None:
        from transformers import DynamicCache

        self._vocoder = vocoder
        self._cache = DynamicCache(config=vocoder.model.pre_transformer.config)
        self._states: Tensor | None = None
        self._frames = 0
        self._sent = 0

    @torch.inference_mode()
    def add(self, codes: Tensor, *, last: bool = False) -> Tensor:
        if not codes.shape[1]:
            return torch.zeros(0)
        model = self._vocoder.model
        vectors = model.code_embedding(codes[None] + model.code_offset).mean(1)
        fresh = model.pre_transformer(
            inputs_embeds=vectors, past_key_values=self._cache, use_cache=True
        ).last_hidden_state
        states = fresh if self._states is None else torch.cat([self._states, fresh], dim=1)
        self._frames += codes.shape[1]
        start = self._frames - states.shape[1]
        self._states = states[:, -self._vocoder.back :]
        sound = states.transpose(1, 2)
        for blocks in model.upsample:
            for block in blocks:
                sound = block(sound)
        for block in model.decoder:
            sound = block(sound)
        begin = start * self._vocoder.samples_per_frame
        samples = sound[0, 0, self._sent - begin :].clamp(-1, 1).float().cpu()
        self._sent += len(samples)
        return samples
