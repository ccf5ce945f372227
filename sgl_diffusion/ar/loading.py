"""Loads what speaks, of whichever family a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.ar.qwen3_talker import Qwen3Talker
from sgl_diffusion.ar.qwen3_vocoder import Qwen3Vocoder
from sgl_diffusion.ar.qwen25_talker import Qwen25Talker
from sgl_diffusion.ar.stages.part import Setting
from sgl_diffusion.ar.talker import Talker
from sgl_diffusion.ar.token2wav import Token2Wav
from sgl_diffusion.ar.vocoder import Vocoder
from sgl_diffusion.ar.voices import read_voices, voice_names
from sgl_diffusion.components.pretrained import load_part


def load_talker(
    setting: Setting, note: Callable[[str], None]
) -> tuple[Talker, tuple[str, ...]] | None:
    """With the names of its voices; None where the checkpoint has none, or none is wanted."""
    config = _speaking(setting)
    if config is None:
        return None
    note("loading the talker")
    voices = voice_names(setting.folder, config)
    rows, record = setting.limits.rows, setting.record
    if config.model_type == "qwen2_5_omni":
        from transformers import Qwen2_5OmniTalkerForConditionalGeneration as Qwen25

        model = _part(Qwen25, config.talker_config, "talker.", setting)
        codes = int(config.token2wav_config.dit_config.num_embeds) + 1
        return Qwen25Talker(model, codes, rows, record), voices
    from transformers import Qwen3OmniMoeTalkerForConditionalGeneration as Qwen3

    model = _part(Qwen3, config.talker_config, "talker.", setting)
    return Qwen3Talker(model, rows, record), voices


def load_vocoder(setting: Setting, note: Callable[[str], None]) -> Vocoder | None:
    """None where the checkpoint has none, or none is wanted."""
    config = _speaking(setting)
    if config is None:
        return None
    note("loading the decoder of speech")
    if config.model_type == "qwen2_5_omni":
        from transformers import Qwen2_5OmniToken2WavModel

        # It solves an equation: in full precision, as its authors do.
        model = _part(
            *(Qwen2_5OmniToken2WavModel, config.token2wav_config, "token2wav.", setting),
            dtype=torch.float32,
        )
        voices = read_voices(setting.folder)
        return Token2Wav(model, voices, setting.limits.look_ahead)
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as models

    model = _part(models.Qwen3OmniMoeCode2Wav, config.code2wav_config, "code2wav.", setting)
    return Qwen3Vocoder(model, voice_names(setting.folder, config))


def _speaking(setting: Setting) -> Any | None:
    """The configuration of a model that speaks."""
    from transformers import AutoConfig

    if not setting.limits.speech:
        return None
    config = AutoConfig.from_pretrained(setting.folder, local_files_only=True)
    return config if config.enable_audio_output else None


def _part(
    kind: Any, config: Any, prefix: str, setting: Setting, *, dtype: torch.dtype | None = None
) -> Any:
    folder: Path = setting.folder
    return load_part(
        kind, config, folder, prefix, dtype=dtype or setting.dtype, device=setting.device
    )
