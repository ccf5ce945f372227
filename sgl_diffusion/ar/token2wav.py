"""Qwen2.5's codes to sound as they come: a flow that is solved block by block, then a BigVGAN.

The library solves the flow for a whole answer at once. In one evaluation of its transformer a layer
looks one block ahead, and few look one back, so the evaluations can follow each other through the
answer like a wave: each is made for a block as soon as the one before it is made for the block
ahead. What comes out is the solution of the whole, one block later for each evaluation: with Qwen's
numbers nine seconds of speech later. With a `look_ahead` only that many evaluations look ahead:
sound comes sooner, and is a little different. What layers look back at is kept, so a block goes
once through each, and a second time through those few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.bigvgan import Waves
from sgl_diffusion.ar.vocoder import Piece
from sgl_diffusion.ar.voices import Voice
from sgl_diffusion.ar.windows import Window

_POINTS = 10
_GUIDANCE = 0.5
_THIRD = 1 / 3


def _times() -> Tensor:
    """Between which the flow is solved, closer together at its beginning."""
    even = torch.linspace(0, 1, _POINTS)
    return even - (torch.cos(torch.pi / 2 * even) - 1 + even)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A voice as the transformer takes it, with and without: [2, dim] each."""

    heard: Tensor
    manner: Tensor


class Token2Wav:
    groups = 1
    together = 1

    def __init__(self, model: Any, voices: dict[str, Voice], look_ahead: int | None) -> None:
        self.dit = model.code2wav_dit_model
        self.waves = Waves(model.code2wav_bigvgan_model)
        config = self.dit.config
        self.block = int(config.block_size)
        self.repeats = int(config.repeats)
        self.look_ahead = look_ahead
        self.voices = tuple(voices)
        self._voices = voices
        self._prepared: dict[str, _Prepared] = {}

    def stream(self, voice: str, seed: int) -> Token2WavStream:
        return Token2WavStream(self, self._prepare(voice), seed)

    def decode(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [stream.add(codes, last=last) for stream, codes, last in pieces]

    @torch.inference_mode()
    def _prepare(self, name: str) -> _Prepared:
        if name not in self._prepared:
            voice, device = self._voices[name], self.dit.device
            sample, manner = voice.sample.to(device), voice.manner.to(device)
            both = torch.cat([sample, torch.zeros_like(sample)])
            heard = self.dit.input_embed.spk_encoder(both)
            manners = torch.cat([manner, torch.zeros_like(manner)])
            self._prepared[name] = _Prepared(heard, manners)
        return self._prepared[name]


class Token2WavStream:
    """The sound of one answer."""

    def __init__(self, decoder: Token2Wav, voice: _Prepared, seed: int) -> None:
        self._decoder = decoder
        self._generator = torch.Generator().manual_seed(seed)
        self._codes = torch.zeros(0, dtype=torch.long, device=decoder.dit.device)
        self._begun = 0
        times = _times().to(decoder.dit.device)
        self._wave = [
            _Evaluation(decoder, voice, times, index) for index in range(4 * (_POINTS - 1))
        ]
        self._sound = decoder.waves.stream()

    @torch.inference_mode()
    def add(self, codes: Tensor, *, last: bool = False) -> Tensor:
        decoder = self._decoder
        self._codes = torch.cat([self._codes, codes[0]])
        here = len(self._codes) * decoder.repeats
        if not last:
            here -= here % decoder.block
        fresh, self._begun = here - self._begun, here
        if not fresh and not last:
            return torch.zeros(0)
        mels = int(decoder.dit.mel_dim)
        # Drawn in parts it is what the library draws at once.
        noise = torch.randn(fresh, mels, generator=self._generator)
        flow = _Flow(noise.to(self._codes.device), [])
        for evaluation in self._wave:
            flow = evaluation.advance(flow, self._codes, last=last)
        return self._sound.add(flow.start, last=last)


@dataclass(frozen=True, eq=False)
class _Flow:
    """Frames on their way: [frames, mels] at the start of a step, and the slopes found in it."""

    start: Tensor
    slopes: list[Tensor]

    def place(self, stage: int, step: Tensor) -> Tensor:
        """Where the next slope is looked for."""
        start, slopes = self.start, self.slopes
        if stage == 0:
            return start
        if stage == 1:
            return start + step * slopes[0] * _THIRD
        if stage == 2:
            return start + step * (slopes[1] - slopes[0] * _THIRD)
        return start + step * (slopes[0] - slopes[1] + slopes[2])

    def end(self, step: Tensor) -> Tensor:
        first, second, third, fourth = self.slopes
        return self.start + (first + 3 * (second + third) + fourth) * step / 8

    def joined(self, other: _Flow) -> _Flow:
        slopes = [torch.cat(pair) for pair in zip(self.slopes, other.slopes, strict=True)]
        return _Flow(torch.cat([self.start, other.start]), slopes)

    def cut(self, begin: int, end: int | None = None) -> _Flow:
        return _Flow(self.start[begin:end], [slope[begin:end] for slope in self.slopes])


class _Evaluation:
    """One evaluation of the transformer, at one of four stages of one step, for all frames in their
    turn. Its layers keep the frames that they look back at, and those that wait for frames ahead;
    it keeps what belongs to those that are on their way."""

    def __init__(self, decoder: Token2Wav, voice: _Prepared, times: Tensor, index: int) -> None:
        step, self._stage = divmod(index, 4)
        begin, end = times[step], times[step + 1]
        self._step = end - begin
        shares = (0.0, _THIRD, 2 / 3)
        time = end if self._stage == 3 else begin + self._step * shares[self._stage]
        self._decoder, self._voice = decoder, voice
        self._when = decoder.dit.time_embed(time.repeat(2))
        limit = decoder.look_ahead
        self._looks = limit is None or index < limit
        self._windows = [
            Window(
                layer.look_backward_block * decoder.block,
                layer.look_ahead_block * decoder.block if self._looks else 0,
                dim=1,
            )
            for layer in decoder.dit.transformer_blocks
        ]
        self._begun = 0
        self._waiting: _Flow | None = None

    def advance(self, flow: _Flow, codes: Tensor, *, last: bool) -> _Flow:
        """Take frames of the evaluation before; returns those that are ready for the next one."""
        waiting = flow if self._waiting is None else self._waiting.joined(flow)
        slope = self._velocity(flow.place(self._stage, self._step), codes, last=last)
        count = len(slope)
        self._waiting = waiting.cut(count)
        ready = waiting.cut(0, count)
        ready = _Flow(ready.start, [*ready.slopes, slope])
        return _Flow(ready.end(self._step), []) if self._stage == 3 else ready

    def _velocity(self, fresh: Tensor, codes: Tensor, *, last: bool) -> Tensor:
        """[frames, mels] to what is final now. The first frame begins a block."""
        dit = self._decoder.dit
        hidden = self._embedded(fresh, codes)
        about: _Surroundings | None = None
        for layer, window in zip(dit.transformer_blocks, self._windows, strict=True):
            view = window.take(hidden, last=last)
            if not view.count:
                hidden = hidden[:, :0]
                continue
            extent = (view.start, view.steps.shape[1])
            if about is None or about.extent != extent:
                about = self._surroundings(view.steps, extent)
            hidden = layer(
                view.steps, self._when, position_embeddings=about.turns, block_diff=about.apart
            )[:, view.new]
        with_voice, without = dit.proj_out(dit.norm_out(hidden, self._when))
        guided: Tensor = with_voice + (with_voice - without) * _GUIDANCE
        return guided

    def _embedded(self, fresh: Tensor, codes: Tensor) -> Tensor:
        """With the voice and without, [2, frames, width]."""
        dit, voice, count = self._decoder.dit, self._voice, len(fresh)
        begin, repeats = self._begun, self._decoder.repeats
        self._begun = end = begin + count
        told = codes[begin // repeats : -(-end // repeats)][None]
        text = torch.cat([dit.text_embed(told), dit.text_embed(told, drop_code=True)])
        given = [
            fresh.expand(2, -1, -1),
            voice.heard[:, None].expand(-1, count, -1),
            text[:, :count],
            voice.manner[:, None].expand(-1, count, -1),
        ]
        embedded: Tensor = dit.input_embed.proj(torch.cat(given, dim=-1))
        return embedded

    def _surroundings(self, steps: Tensor, extent: tuple[int, int]) -> _Surroundings:
        start, count = extent
        dit = self._decoder.dit
        places = torch.arange(start, start + count, device=steps.device)
        blocks = places // self._decoder.block
        apart = blocks[None] - blocks[:, None]
        if not self._looks:
            # Out of sight also where they come together, or it would matter how sound is cut.
            apart = apart.masked_fill(apart > 0, count)
        turns = dit.rotary_embed(steps, places.expand(2, -1))
        return _Surroundings(extent, turns, apart.expand(2, dit.num_attention_heads, -1, -1))


@dataclass(frozen=True, eq=False)
class _Surroundings:
    """Which frames, how they are turned by their places, how many blocks each is from each."""

    extent: tuple[int, int]
    turns: Any
    apart: Tensor
