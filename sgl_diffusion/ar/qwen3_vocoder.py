"""Codes to sound as they come: Qwen3's code2wav with carried state, equal to one whole decode.

The transformer keeps its window of keys and values. The convolutions behind it look back a fixed
number of frames, so each piece is decoded with that many states before it, and the samples that
were sent already are cut off by their index in the whole. The upsamplers look one step ahead: the
last samples of a piece come with the next one, and those of the last piece never, as in the model's
own decode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.vocoder import Piece


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
    together = 16

    def __init__(self, model: Any, voices: tuple[str, ...]) -> None:
        self.model = model
        self.voices = voices
        self.groups = int(model.config.num_quantizers)
        self.back = frames_back(model.config)
        self.samples_per_frame = int(model.total_upsample)

    def stream(self, voice: str, seed: int) -> Qwen3Stream:
        """The codes say whose voice it is."""
        return Qwen3Stream(self)

    @torch.inference_mode()
    def decode(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Those of one length go through the convolutions together."""
        found = [torch.zeros(0)] * len(pieces)
        by_length: dict[int, list[int]] = {}
        states: dict[int, Tensor] = {}
        for index, (stream, codes, _) in enumerate(pieces):
            assert isinstance(stream, Qwen3Stream)
            if codes.shape[1]:
                states[index] = stream.take(codes)
                by_length.setdefault(states[index].shape[1], []).append(index)
        for group in by_length.values():
            sounds = self._convolved(torch.cat([states[index] for index in group]))
            for index, sound in zip(group, sounds, strict=True):
                stream = pieces[index][0]
                assert isinstance(stream, Qwen3Stream)
                found[index] = stream.cut(sound)
        return found

    def _convolved(self, states: Tensor) -> Tensor:
        """[rows, frames, width] to [rows, samples]."""
        sound = states.transpose(1, 2)
        for blocks in self.model.upsample:
            for block in blocks:
                sound = block(sound)
        for block in self.model.decoder:
            sound = block(sound)
        return sound[:, 0]


class Qwen3Stream:
    """The sound of one answer."""

    def __init__(self, vocoder: Qwen3Vocoder) -> None:
        from transformers import DynamicCache

        self._vocoder = vocoder
        self._cache = DynamicCache(config=vocoder.model.pre_transformer.config)
        self._states: Tensor | None = None
        self._frames = 0
        self._start = 0
        self._sent = 0

    def add(self, codes: Tensor, *, last: bool = False) -> Tensor:
        return self._vocoder.decode([(self, codes, last)])[0]

    def take(self, codes: Tensor) -> Tensor:
        """The states that the convolutions need for new codes, [1, frames, width]."""
        model = self._vocoder.model
        vectors = model.code_embedding(codes[None] + model.code_offset).mean(1)
        fresh = model.pre_transformer(
            inputs_embeds=vectors, past_key_values=self._cache, use_cache=True
        ).last_hidden_state
        states = fresh if self._states is None else torch.cat([self._states, fresh], dim=1)
        self._frames += codes.shape[1]
        self._start = self._frames - states.shape[1]
        self._states = states[:, -self._vocoder.back :]
        return states

    def cut(self, sound: Tensor) -> Tensor:
        """What was not sent yet of the samples of the states that were taken last."""
        begin = self._start * self._vocoder.samples_per_frame
        samples = sound[self._sent - begin :].clamp(-1, 1).float().cpu()
        self._sent += len(samples)
        return samples
