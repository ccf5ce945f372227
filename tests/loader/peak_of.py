"""Load a model in a process of its own and print what it took: run by test_peak.py.

The peak is that of the resident memory, pages of mapped files included.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionModel, T5EncoderModel

from sgl_diffusion.components.pretrained import load_pretrained, load_vae
from sgl_diffusion.loader.index import Component, read_config
from sgl_diffusion.loader.weights import load_weights
from sgl_diffusion.models.flux import FluxParams, FluxTransformer
from sgl_diffusion.models.flux_weights import RULES


def resident(field: str) -> int:
    """Bytes, from the kernel: VmRSS is now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def transformer(folder: Path, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = FluxTransformer(FluxParams.from_config(read_config(folder)))
    load_weights(model, folder, RULES, dtype=dtype)
    return model


def text_encoder(folder: Path, dtype: torch.dtype) -> nn.Module:
    part = Component(folder, "transformers", "T5EncoderModel")
    model: nn.Module = load_pretrained(
        T5EncoderModel, part, dtype=dtype, device=torch.device("cpu")
    )
    return model


def vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderKL

    part = Component(folder, "diffusers", "AutoencoderKL")
    model: nn.Module = load_vae(AutoencoderKL, part, dtype=dtype, device=torch.device("cpu"))
    return model


def vision(folder: Path, dtype: torch.dtype) -> nn.Module:
    part = Component(folder, "transformers", "CLIPVisionModel")
    model: nn.Module = load_pretrained(
        CLIPVisionModel, part, dtype=dtype, device=torch.device("cpu")
    )
    return model


KINDS = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "vision": vision}


def main(kind: str, folder: Path, dtype: torch.dtype) -> None:
    # What libraries take when they first run is none of the weights.
    (torch.ones(64, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)).float().sum()
    if kind == "vae":
        importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")
    before = resident("VmRSS")
    model = KINDS[kind](folder, dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"size": size, "peak": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3]))
