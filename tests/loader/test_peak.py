"""The memory that loading takes is that of the weights, whatever their precision on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FLOOR = 24 << 20  # what a first load takes besides: code of libraries, headers, one open mapping


@torch.no_grad()
def write(what: str, folder: Path, stored: torch.dtype, scale: int) -> None:
    """Random weights in shards; `scale` 1 is some 50 million of them."""
    model: Any
    if what == "transformer":
        from diffusers import FluxTransformer2DModel

        kind, config = FluxTransformer2DModel, {"num_attention_heads": 4}
        with torch.device("meta"):
            model = kind(num_layers=4 * scale, num_single_layers=4 * scale, **config)
        model = model.to_empty(device="cpu").to(stored)
    else:
        from transformers import T5Config, T5EncoderModel

        with torch.device("meta"):
            model = T5EncoderModel(
                T5Config(d_model=768, d_ff=2048, num_layers=6 * scale, vocab_size=32128)
            )
        model = model.to_empty(device="cpu").to(stored)
    for parameter in model.parameters():
        parameter.normal_()
    model.save_pretrained(folder, max_shard_size="150MB")


def ratio(what: str, folder: Path, dtype: str, least: int) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.loader.peak_of", what, str(folder), dtype],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] >= least, found
    return float((found["peak"] - FLOOR) / found["size"])


@pytest.mark.parametrize("what", ["transformer", "text_encoder"])
def test_loading_takes_the_size_of_the_weights(what: str, tmp_path: Path) -> None:
    write(what, tmp_path, torch.bfloat16, scale=1)
    assert ratio(what, tmp_path, "float32", least=200_000_000) <= 1.15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "wanted", "scale"),
    [
        (torch.float32, "float32", 6),
        (torch.bfloat16, "bfloat16", 12),
        (torch.float16, "float32", 6),
        (torch.float32, "bfloat16", 12),
    ],
)
@pytest.mark.parametrize("what", ["transformer", "text_encoder"])
def test_loading_a_gigabyte(
    what: str, stored: torch.dtype, wanted: str, scale: int, tmp_path: Path
) -> None:
    write(what, tmp_path, stored, scale)
    found = ratio(what, tmp_path, wanted, least=1_000_000_000)
    assert found <= 1.15
