"""Options of an app that chats."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion.base.config import PRECISIONS, option


@dataclass(frozen=True, kw_only=True)
class OmniOptions:
    """What the worker of an omni model needs to load and run it."""

    model_path: str = option("", "Folder of an omni model as transformers writes it, or hub id.")
    revision: str | None = option(None, "Branch, tag or commit of a hub repository.")
    model_name: str | None = option(
        None, "Name of the served model; default: qwen3-omni or qwen2.5-omni."
    )
    device: str = option("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "Precision of the model.", choices=PRECISIONS)
    max_batch_rows: int = option(16, "Most answers written at the same time.", least=1)
    max_sequence_length: int = option(
        8192, "Most tokens of one request, prompt and answer.", least=16
    )
    max_prefix_memory: float = option(
        1.0, "GiB for the beginnings of earlier prompts, which need not be read again.", least=0
    )
    max_media_memory: float = option(
        0.5, "GiB for pictures, films and sound that may come again.", least=0
    )
