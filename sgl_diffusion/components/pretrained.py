"""Loads components of other libraries: safetensors only, no weight left at a random value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.index import ModelIndex, read_config
from sgl_diffusion.loader.weights import weight_files


def load_pretrained(
    kind: type[Any], folder: Path, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """`kind.from_pretrained(folder)` for inference."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    read_config(folder)
    weight_files(folder)
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise SetupError(
            f"{folder} cannot be loaded as {kind.__name__} ({type(error).__name__}).",
            hint="Check that config.json and the weights belong together and are complete.",
            code="bad_checkpoint",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise SetupError(
            f"The weights in {folder} lack {', '.join(missing[:8])} of {kind.__name__}.",
            hint="Check that config.json and the weights belong together and are complete.",
            code="bad_checkpoint",
        )
    return model.to(device).requires_grad_(False).eval()


def load_tokenizer(index: ModelIndex, name: str = "tokenizer") -> Any:
    """The tokenizer that a repository keeps in the folder `name`."""
    from transformers import AutoTokenizer

    folder = index.component(name).folder
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise SetupError(
            f"{folder} holds no tokenizer that can be loaded ({type(error).__name__}).",
            hint="Check that the download is complete.",
        ) from error
