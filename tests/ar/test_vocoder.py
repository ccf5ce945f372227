"""Sound in pieces is the sound of the whole."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from sgl_diffusion.ar.qwen3_vocoder import Qwen3Vocoder
from sgl_diffusion.ar.vocoder import Piece


@pytest.fixture(scope="module")
def code2wav(qwen3_of_transformers: Any) -> Any:
    return qwen3_of_transformers.code2wav


@pytest.mark.parametrize("pieces", [(100,), (1,) * 12 + (30, 58), (10,) * 10, (25, 3, 72)])
def test_any_cut_gives_the_whole_decode(code2wav: Any, pieces: tuple[int, ...]) -> None:
    codes = torch.randint(0, 1000, (4, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = code2wav(codes[None])[0, 0]
    stream = Qwen3Vocoder(code2wav, ("ethan",)).stream("ethan", 0)
    sound = torch.cat([stream.add(piece) for piece in codes.split(pieces, dim=1)])
    assert sound.shape == whole.shape
    assert 0.01 < float(whole.std()) and float(whole.abs().max()) < 1.0
    torch.testing.assert_close(sound, whole, atol=1e-4, rtol=0)


def test_streams_that_are_together_do_not_mix(code2wav: Any) -> None:
    """In fp64, where rounding hides nothing. They begin at different times, and go together where
    they are alike."""
    model = copy.deepcopy(code2wav).double()
    vocoder = Qwen3Vocoder(model, ("ethan",))
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 1000, (4, 30), generator=generator) for _ in range(3)]
    streams = [vocoder.stream("ethan", 0) for _ in codes]
    sounds: list[list[torch.Tensor]] = [[] for _ in codes]
    for begin, who in ((0, [0]), (10, [0, 1]), (20, [0, 1, 2]), (30, [1, 2]), (40, [2])):
        pieces: list[Piece] = [
            (streams[i], codes[i][:, begin - 10 * i : begin - 10 * i + 10], False) for i in who
        ]
        for index, sound in zip(who, vocoder.decode(pieces), strict=True):
            sounds[index].append(sound)
    for told, parts in zip(codes, sounds, strict=True):
        with torch.inference_mode():
            whole = model(told[None])[0, 0].float()
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def test_a_piece_costs_what_is_new_in_it(code2wav: Any) -> None:
    """Over all pieces no convolution makes a step twice."""
    made: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda module, given, output: made.update({name: output.shape[-1]})

    modules = dict(code2wav.named_modules())
    convolutions = [name for name in modules if isinstance(modules[name], torch.nn.Conv1d)]
    hooks = [modules[name].register_forward_hook(count(name)) for name in convolutions]
    codes = torch.randint(0, 1000, (4, 48), generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            code2wav(codes[None])
        whole, stream = dict(made), Qwen3Vocoder(code2wav, ("ethan",)).stream("ethan", 0)
        made.clear()
        for piece in codes.split(4, dim=1):
            stream.add(piece)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(convolutions) == len(whole) > 25
    assert dict(made) == whole
