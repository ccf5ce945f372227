"""A BigVGAN over a spectrum that comes in pieces: the samples are those of the whole.

Its layers look to both sides. Each keeps the few steps that it still needs, so that a piece costs
what is new in it, and hands on what is final: the last samples wait for the frames behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl_diffusion.ar.windows import Window

# Through a filter of twelve taps to twice the rate, and through another one back.
_ACTIVATION = 5


class _Passage(Protocol):
    def add(self, fresh: Tensor, *, last: bool) -> Tensor:
        """[1, channels, steps] to what is final now."""


class _Layer:
    """`apply` with its own edges at both ends of the sequence; `rate` steps come of each."""

    def __init__(
        self, apply: Callable[[Tensor], Tensor], channels: int, back: int, ahead: int, rate: int = 1
    ) -> None:
        self._apply, self._channels, self._rate = apply, channels, rate
        self._window = Window(back, ahead, dim=2)

    def add(self, fresh: Tensor, *, last: bool) -> Tensor:
        view = self._window.take(fresh, last=last)
        if not view.count:
            return fresh.new_zeros(1, self._channels, 0)
        found = self._apply(view.steps)
        return found[..., view.new.start * self._rate : view.new.stop * self._rate]


class _Chain:
    def __init__(self, *passages: _Passage) -> None:
        self._passages = passages

    def add(self, fresh: Tensor, *, last: bool) -> Tensor:
        for passage in self._passages:
            fresh = passage.add(fresh, last=last)
        return fresh


class _Sum:
    """Of branches that are differently late: what is early waits."""

    def __init__(self, branches: Sequence[_Passage], divisor: int = 1) -> None:
        self._branches, self._divisor = branches, divisor
        self._early: list[Tensor] = []

    def add(self, fresh: Tensor, *, last: bool) -> Tensor:
        found = [branch.add(fresh, last=last) for branch in self._branches]
        if self._early:
            found = [torch.cat(pair, dim=2) for pair in zip(self._early, found, strict=True)]
        count = min(each.shape[2] for each in found)
        self._early = [each[..., count:].clone() for each in found]
        total = found[0][..., :count]
        for each in found[1:]:
            total = total + each[..., :count]
        return total / self._divisor


class Waves:
    def __init__(self, model: Any) -> None:
        self.model = model

    def stream(self) -> WaveStream:
        return WaveStream(self.model)


class WaveStream:
    def __init__(self, model: Any) -> None:
        self._model = model
        several = model.num_residual_blocks
        passages: list[_Passage] = [_near(model.conv_pre)]
        for index, (up,) in enumerate(model.ups):
            blocks = model.resblocks[index * several : (index + 1) * several]
            passages += [_up(up), _Sum([_residual(block) for block in blocks], several)]
        last = model.conv_post
        self._passage = _Chain(*passages, _gentle(model.activation_post, last), _near(last))

    @torch.inference_mode()
    def add(self, frames: Tensor, *, last: bool = False) -> Tensor:
        """`frames` are [n, mels]; returns new samples in [-1, 1], fp32 on the CPU."""
        spectrum = self._model.process_mel_spectrogram(frames.T[None])
        return self._passage.add(spectrum, last=last)[0, 0].clamp(-1, 1).float().cpu()


def _near(conv: Any) -> _Layer:
    (padding,) = conv.padding
    return _Layer(conv, conv.out_channels, padding, padding)


def _up(conv: Any) -> _Layer:
    (taps,), (rate,), (padding,) = conv.kernel_size, conv.stride, conv.padding
    back = -(-(taps - 1 - padding) // rate)
    return _Layer(conv, conv.out_channels, back, (rate - 1 + padding) // rate, rate)


def _gentle(activation: Any, conv: Any) -> _Layer:
    """An activation before a convolution."""
    return _Layer(activation, conv.in_channels, _ACTIVATION, _ACTIVATION)


def _residual(block: Any) -> _Chain:
    first, second = block.activations[::2], block.activations[1::2]
    units = []
    for conv, more, act, other in zip(block.convs1, block.convs2, first, second, strict=True):
        branch = _Chain(_gentle(act, conv), _near(conv), _gentle(other, more), _near(more))
        units.append(_Sum([_Chain(), branch]))
    return _Chain(*units)
