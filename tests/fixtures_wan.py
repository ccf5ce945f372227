"""Tiny Wan checkpoints, built once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgl_diffusion.loader.index import read_config
from sgl_diffusion.loader.weights import load_weights
from sgl_diffusion.models.wan import WanParams, WanTransformer
from sgl_diffusion.models.wan_weights import RULES
from tests.checkpoints.random_wan import build_tiny_wan


@pytest.fixture(scope="session")
def tiny_wan_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads of 16 channels."""
    return build_tiny_wan(tmp_path_factory.mktemp("models") / "tiny-wan-a", heads=4, head_dim=16)


@pytest.fixture(scope="session")
def tiny_wan_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 heads of 64 channels, another seed and another shift."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan-b"
    return build_tiny_wan(folder, heads=2, head_dim=64, seed=7, flow_shift=5.0)


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> WanTransformer:
    """Our transformer with the weights of a repository folder."""
    folder = path / "transformer"
    with torch.device("meta"):
        model = WanTransformer(WanParams.from_config(read_config(folder)))
    load_weights(model, folder, RULES, dtype=dtype)
    return model
