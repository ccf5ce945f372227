"""The voices of a model. Those of Qwen2.5-Omni are in `spk_dict.pt`, the one file that is no
safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.base.errors import SetupError

_FILE = "spk_dict.pt"
_LARGEST = 64 << 20
_USUAL = "ethan"


@dataclass(frozen=True, eq=False)
class Voice:
    """`begin` is the token of text that a speech begins with, `manner` [1, dim] and the spectrum
    `sample` [1, frames, mels] are for the decoder of its codes."""

    begin: int
    manner: Tensor
    sample: Tensor


def voice_names(folder: Path, config: Any) -> tuple[str, ...]:
    """Of the model with this configuration; the first is the default."""
    if config.model_type == "qwen2_5_omni":
        return tuple(read_voices(folder))
    names = config.talker_config.speaker_id
    if not names:
        raise SetupError(f"The talker in {folder} has no voices.", code="bad_checkpoint")
    return tuple(sorted(names, key=lambda name: (name != _USUAL, name)))


def read_voices(folder: Path) -> dict[str, Voice]:
    path = folder / _FILE
    if not path.is_file():
        raise SetupError(
            f"{folder} has no {_FILE}, which holds the voices of Qwen2.5-Omni.",
            hint="Check that the download is complete, or serve it with --no-speech.",
            code="bad_checkpoint",
        )
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("far too large")
        told = torch.load(path, map_location="cpu", weights_only=True)
        voices = {str(name): _voice(values) for name, values in told.items()}
    except Exception as error:
        raise SetupError(
            f"The voices in {path} cannot be read ({type(error).__name__}).",
            hint="Check that the download is complete.",
            code="bad_checkpoint",
        ) from error
    if not voices:
        raise SetupError(f"{path} holds no voice.", code="bad_checkpoint")
    return dict(sorted(voices.items()))


def _voice(values: Any) -> Voice:
    manner, sample = values["cond"].float(), values["ref_mel"].float()
    if manner.ndim != 2 or sample.ndim != 3 or len(manner) != 1 or len(sample) != 1:
        raise ValueError("a voice of another shape")
    return Voice(int(values["bos_token"]), manner, sample)
