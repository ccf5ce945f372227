"""Every native pipeline class on two and on four ranks: the latents are those of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.distributed.layout import Layout
from sgl_diffusion.recipes import flux, qwen_image
from tests.distributed.ranks import Group, Ranks, running_ranks
from tests.engine.parallel.served import Wishes, compare
from tests.recipes.matrix import ROWS, Row, checkpoint, files_in
from tests.recipes.parity import opened

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # four processes load torch

LAYOUTS = [Layout(1, 1, 2), Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 2, 2), Layout(2, 1, 2)]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ranks]:
    with running_ranks(request.param, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def _wishes(row: Row, files: tuple[str, ...], edge: int) -> Wishes:
    """With guidance, as a step finds it and as it was, and without; two outputs, and a clip where
    the class makes one."""
    frames = 5 if max(row.frames) > 1 else 1
    more = {**row.call, "images": files, "num_inference_steps": 2}
    still = min(row.frames)
    return {
        "guided": SamplingParams(
            prompt="a fox",
            seed=1,
            width=5 * edge,
            height=3 * edge,
            num_frames=still,
            **more,
            **row.on,
        ),
        "plain": SamplingParams(
            prompt="waves",
            seed=2,
            width=3 * edge,
            height=4 * edge,
            num_outputs=2,
            num_frames=still,
            **more,
            **row.off,
        ),
        "gated": SamplingParams(
            prompt="rain",
            seed=4,
            width=2 * edge,
            height=3 * edge,
            num_frames=still,
            cfg_gate_step=0.5,
            **more,
            **row.on,
        ),
        "clip": SamplingParams(
            prompt="sea",
            seed=3,
            width=4 * edge,
            height=4 * edge,
            num_frames=frames,
            **more,
            **row.on,
        ),
    }


def _adapter(path: Path, target: Path) -> str:
    """On every linear layer of attention, by the names of the checkpoint."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for file in sorted((path / "transformer").glob("*.safetensors")):
        for key, weight in load_file(file).items():
            name, _, leaf = key.rpartition(".")
            if leaf == "weight" and weight.dim() == 2 and "att" in name:
                out, width = weight.shape
                down = torch.randn(4, width, generator=generator) / width**0.5
                up = 0.2 * torch.randn(out, 4, generator=generator)
                tensors[f"transformer.{name}.lora_A.weight"] = down
                tensors[f"transformer.{name}.lora_B.weight"] = up
    assert len(tensors) > 8
    save_file(tensors, target)
    return str(target)


def _small_references(patch: pytest.MonkeyPatch) -> None:
    """What is shown to a model is brought to smaller sizes, which is what takes the time."""
    sizes = [(w // 16 * 2 // 16 * 16, h // 16 * 2 // 16 * 16) for w, h in flux._TRAINED]
    patch.setattr(flux, "_TRAINED", sizes)
    patch.setattr(qwen_image, "_AREA", 128 * 128)
    patch.setattr(qwen_image, "_SMALL_AREA", 96 * 96)


def _compare(everyone: Group, *arguments: Any) -> float:
    with pytest.MonkeyPatch.context() as patch:
        _small_references(patch)
        return compare(everyone, *arguments)


@pytest.mark.parametrize("name", ROWS)
def test_latents_are_those_of_one_rank(
    ranks: Ranks, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    row = ROWS[name]
    path = checkpoint(row, 0, request, tmp_path / "model")
    adapter = _adapter(path, tmp_path / "a.safetensors")
    edge = opened(path).card.size_multiple
    wishes = _wishes(row, files_in(tmp_path, row.pictures[-1]), edge)
    for layout in LAYOUTS:
        if layout.ranks == len(ranks.processes):
            found = ranks.run(_compare, str(path), layout, adapter, wishes)
            assert max(found) < 1e-4, (layout, found)
