"""Qwen2.5's codes to sound as they come: a flow that is solved block by block, then a BigVGAN.

The library solves the flow for a whole answer at once. One evaluation of its transformer looks a
few blocks back and one ahead, so the evaluations can follow each other through the answer like a
wave: each is made for a block as soon as the one before it is made for the block ahead. What comes
out is the solution of the whole, one block later for each evaluation: with Qwen's numbers nine
seconds of speech later. With a `look_ahead` only that many evaluations look ahead: sound comes
sooner, and is a little different.
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
        self.back = self.block * len(config.look_backward_layers)
        self.ahead = self.block * len(config.look_ahead_layers)
        self.look_ahead = look_ahead
        self.voices = tuple(voices)
        self._voices = voices
        self._prepared: dict[str, _Prepared] = {}

    def stream(self, voice: str, seed: int) -> Token2WavStream:
        return Token2WavStream(self, self._prepare(voice), seed)

    def decode(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [stream.add(codes, last=last) for stream, codes, last in pieces]

    @torch.inference_mode()
    def velocity(self, time: Tensor, states: Tensor, codes: Tensor, voice: _Prepared) -> Tensor:
        """Of [frames, mels], whose first frame begins a block, with a code for each `repeats`."""
        dit = self.dit
        count = len(states)
        text = torch.cat([dit.text_embed(codes[None]), dit.text_embed(codes[None], drop_code=True)])
        given = [
            states.expand(2, -1, -1),
            voice.heard[:, None].expand(-1, count, -1),
            text[:, :count],
            voice.manner[:, None].expand(-1, count, -1),
        ]
        hidden = dit.input_embed.proj(torch.cat(given, dim=-1))
        when = dit.time_embed(time.repeat(2))
        places = torch.arange(count, device=states.device)
        turns = dit.rotary_embed(hidden, places.expand(2, -1))
        blocks = places // self.block
        apart = (blocks[None] - blocks[:, None]).expand(2, dit.num_attention_heads, -1, -1)
        for layer in dit.transformer_blocks:
            hidden = layer(hidden, when, position_embeddings=turns, block_diff=apart)
        with_voice, without = dit.proj_out(dit.norm_out(hidden, when))
        guided: Tensor = with_voice + (with_voice - without) * _GUIDANCE
        return guided

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
    turn. It keeps the frames that others look back at, and those that wait for frames ahead."""

    def __init__(self, decoder: Token2Wav, voice: _Prepared, times: Tensor, index: int) -> None:
        step, self._stage = divmod(index, 4)
        begin, end = times[step], times[step + 1]
        self._step = end - begin
        shares = (0.0, _THIRD, 2 / 3)
        self._time = end if self._stage == 3 else begin + self._step * shares[self._stage]
        self._decoder, self._voice = decoder, voice
        limit = decoder.look_ahead
        self._ahead = decoder.ahead if limit is None or index < limit else 0
        self._places: Tensor | None = None
        self._waiting: _Flow | None = None
        self._first = 0  # of the frames in `_places`
        self._done = 0

    def advance(self, flow: _Flow, codes: Tensor, *, last: bool) -> _Flow:
        """Take frames of the evaluation before; returns those that are ready for the next one."""
        fresh = flow.place(self._stage, self._step)
        places = fresh if self._places is None else torch.cat([self._places, fresh])
        waiting = flow if self._waiting is None else self._waiting.joined(flow)
        here = self._first + len(places)
        end = here if last else max(here - self._ahead, self._done)
        count, before = end - self._done, self._done
        slope = fresh[:0]
        if count:
            begin = max(before - self._decoder.back, 0)
            repeats = self._decoder.repeats
            slope = self._decoder.velocity(
                self._time,
                places[begin - self._first :],
                codes[begin // repeats : -(-here // repeats)],
                self._voice,
            )[before - begin : end - begin]
        keep = max(end - self._decoder.back, 0)
        self._places, self._first = places[keep - self._first :], keep
        self._waiting, self._done = waiting.cut(count), end
        ready = waiting.cut(0, count)
        ready = _Flow(ready.start, [*ready.slopes, slope])
        return _Flow(ready.end(self._step), []) if self._stage == 3 else ready
