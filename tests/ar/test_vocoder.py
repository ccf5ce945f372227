"""Sound in pieces is the sound of the whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.ar.qwen3_vocoder import Qwen3Vocoder


@pytest.fixture(scope="module")
def code2wav(tiny_qwen3_omni: Path) -> Any:
    from transformers import Qwen3OmniMoeForConditionalGeneration

    model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tiny_qwen3_omni)
    return model.code2wav.eval()


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


def test_the_convolutions_look_back_no_further(code2wav: Any) -> None:
    """In fp64, where rounding hides nothing; one frame less than needed is heard."""
    model = copy.deepcopy(code2wav).double()
    codes = torch.randint(0, 1000, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(codes[None])[0, 0].float()
    vocoder = Qwen3Vocoder(model, ("ethan",))
    errors = {}
    for back in (vocoder.back, vocoder.back - 2):
        vocoder.back = back
        stream = vocoder.stream("ethan", 0)
        sound = torch.cat([stream.add(piece) for piece in codes.split(15, dim=1)])
        errors[back] = float((sound - whole).abs().max())
    enough, short = errors.values()
    assert enough < 1e-6 < short
