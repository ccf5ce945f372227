"""The small model that the package builds itself."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgl_diffusion.recipes.tiny_wan import build_tiny_wan
from tests.oracles import wan as oracle

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_it_is_small_and_complete(tiny_wan_a: Path) -> None:
    assert sum(f.stat().st_size for f in tiny_wan_a.rglob("*")) < 15e6
    assert not list(tiny_wan_a.parent.glob(".*")), "the folder it was built in is still there"


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


def test_a_model_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    build_tiny_wan(tmp_path / "model")
    assert (tmp_path / "model" / "model_index.json").read_text() == "{}"


def test_a_folder_with_other_things_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diary.txt").write_text("mine")
    with pytest.raises(OSError):
        build_tiny_wan(tmp_path / "model")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


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


def test_a_disk_that_is_full_is_told(tmp_path):
    """In a process of its own, whose files may not grow."""
    code = """
        import resource, sys
        from sgl_diffusion.base.config import EngineOptions
        from sgl_diffusion.base.errors import SetupError
        from sgl_diffusion.recipes.registry import open_pipeline
        import diffusers, transformers
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            open_pipeline(EngineOptions(data_dir=sys.argv[1]), lambda note: None)
        except SetupError as error:
            print(error.code, error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.startswith("insufficient_storage The disk is too full"), done.stderr[-2000:]
    assert not list(tmp_path.glob("models/*"))
