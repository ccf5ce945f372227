"""Codes to sound as they come: Qwen3's code2wav with carried state, equal to one whole decode.

    codes ──pre_transformer──▶ states ──upsample──▶ ──decoder──▶ samples

The transformer keeps its window of keys and values, every convolution the last of its own inputs: a
piece costs what is new in it. The wider ones look one step ahead: the last samples of a piece come
with the next one, and those of the last piece never, as in the model's own decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.vocoder import Piece


class Qwen3Vocoder:
    together = 16

    def __init__(self, model: Any, voices: tuple[str, ...]) -> None:
        self.model = model
        self.voices = voices
        self.groups = int(model.config.num_quantizers)

    def stream(self, voice: str, seed: int) -> Qwen3Stream:
        """The codes say whose voice it is."""
        return Qwen3Stream(self)

    @torch.inference_mode()
    def decode(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Those of one length, and as far as each other, go through the convolutions together."""
        found = [torch.zeros(0)] * len(pieces)
        alike: dict[tuple[int, ...], list[tuple[int, Qwen3Stream, Tensor]]] = {}
        for index, (stream, codes, _) in enumerate(pieces):
            assert isinstance(stream, Qwen3Stream)
            if codes.shape[1]:
                states = stream.take(codes)
                kept = (tail.shape[-1] for tail in stream.tails)
                alike.setdefault((states.shape[1], *kept), []).append((index, stream, states))
        for group in alike.values():
            streams = [stream for _, stream, _ in group]
            carry = _Carry(streams)
            states = torch.cat([states for _, _, states in group]).transpose(1, 2)
            sounds = carry.convolved(self.model, states)[:, 0].clamp(-1, 1).float().cpu()
            for (index, _, _), sound in zip(group, sounds, strict=True):
                found[index] = sound
        return found


class Qwen3Stream:
    """The sound of one answer. `tails` are what its convolutions keep, in the order in which they
    are passed; empty before the first piece."""

    def __init__(self, vocoder: Qwen3Vocoder) -> None:
        from transformers import DynamicCache

        self._vocoder = vocoder
        self._cache = DynamicCache(config=vocoder.model.pre_transformer.config)
        self.tails: list[Tensor] = []

    def add(self, codes: Tensor, *, last: bool = False) -> Tensor:
        return self._vocoder.decode([(self, codes, last)])[0]

    def take(self, codes: Tensor) -> Tensor:
        """The states of new codes, [1, frames, width]."""
        model = self._vocoder.model
        vectors = model.code_embedding(codes[None] + model.code_offset).mean(1)
        states: Tensor = model.pre_transformer(
            inputs_embeds=vectors, past_key_values=self._cache, use_cache=True
        ).last_hidden_state
        return states


class _Carry:
    """One pass of some streams through the convolutions. All that goes through is new, [streams,
    channels, steps]; of what was there before, each convolution gets the inputs that it kept."""

    def __init__(self, streams: Sequence[Qwen3Stream]) -> None:
        self._streams = streams
        before = zip(*(stream.tails for stream in streams), strict=True)
        self._before = iter([torch.cat(tails) for tails in before])
        for stream in streams:
            stream.tails = []

    def convolved(self, model: Any, states: Tensor) -> Tensor:
        for wider, block in model.upsample:
            states = self._next(block, self._wider(wider, states))
        first, *blocks, activation, last = model.decoder
        states = self._causal(first, states)
        for block in blocks:
            begin, wider, *units = block.block
            states = self._wider(wider, begin(states))
            for unit in units:
                states = self._unit(unit, states)
        return self._causal(last, activation(states))

    def _next(self, block: Any, states: Tensor) -> Tensor:
        hidden = block.norm(self._causal(block.dwconv, states).transpose(1, 2))
        hidden = block.gamma * block.pwconv2(block.act(block.pwconv1(hidden)))
        return states + hidden.transpose(1, 2)

    def _unit(self, unit: Any, states: Tensor) -> Tensor:
        hidden = self._causal(unit.conv1, unit.act1(states))
        return states + self._causal(unit.conv2, unit.act2(hidden))

    def _causal(self, net: Any, fresh: Tensor) -> Tensor:
        """As many steps as there are new ones; before the first are zeros."""
        zeros = fresh.new_zeros(*fresh.shape[:2], net.padding)
        inputs = self._joined(fresh, zeros, net.padding)
        if not fresh.shape[2]:
            return fresh.new_zeros(len(fresh), net.conv.out_channels, 0)
        found: Tensor = net.conv(inputs)
        return found

    def _wider(self, net: Any, fresh: Tensor) -> Tensor:
        """The library cuts off what lacks inputs, on both sides: so does this, with what is kept
        in the place of what lacks."""
        keep, rest = divmod(net.left_pad, net.conv.stride[0])
        assert not rest
        inputs = self._joined(fresh, fresh[..., :0], keep)
        if not inputs.shape[2]:
            return fresh.new_zeros(len(fresh), net.conv.out_channels, 0)
        found: Tensor = net(inputs)
        return found

    def _joined(self, fresh: Tensor, first: Tensor, keep: int) -> Tensor:
        """New inputs behind those that were kept; the last of them are kept for the next pass."""
        inputs = torch.cat([next(self._before, first), fresh], dim=2)
        tails = inputs[..., max(inputs.shape[2] - keep, 0) :].clone()
        for stream, tail in zip(self._streams, tails.split(1), strict=True):
            stream.tails.append(tail)
        return inputs
