"""The random model that many tests run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.random_wan import build_tiny_wan
from tests.oracles import wan as oracle

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_it_is_small_and_complete(tiny_wan_a: Path) -> None:
    assert sum(f.stat().st_size for f in tiny_wan_a.rglob("*")) < 15e6


def test_the_seed_decides(tmp_path: Path, tiny_wan_a: Path) -> None:
    first = load_file(tiny_wan_a / WEIGHTS)
    same = load_file(build_tiny_wan(tmp_path / "same") / WEIGHTS)
    other = load_file(build_tiny_wan(tmp_path / "other", seed=1) / WEIGHTS)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_no_weight_could_be_dropped_unseen(tiny_wan_a: Path) -> None:
    for file in tiny_wan_a.rglob("*.safetensors"):
        for name, value in load_file(file).items():
            norm = "norm" in name and not name.endswith("bias")
            ineffective = torch.ones_like(value) if norm else torch.zeros_like(value)
            assert (value - ineffective).abs().mean() > 0.01, name


@pytest.mark.parametrize("name", ["tiny_wan_a", "tiny_wan_b"])
def test_pictures_are_neither_flat_nor_saturated(name: str, request: pytest.FixtureRequest) -> None:
    pipe = oracle.pipeline(request.getfixturevalue(name))
    latents, frames = oracle.run(
        pipe, "a red cat", seed=3, height=64, width=96, num_frames=5, num_inference_steps=4
    )
    assert 0.5 < float(latents.std()) < 4
    for frame in frames.float():
        assert 10 < float(frame.std()) < 70
        assert float(((frame == 0) | (frame == 255)).float().mean()) < 0.02
