"""A worker of four ranks gives the latents of one rank: jobs, guidance, adapters, cancelling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, SglError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.distributed.layout import Layout
from sgl_diffusion.engine.parallel.follower import SilentOutbox
from sgl_diffusion.engine.parallel.leader import Leader
from sgl_diffusion.engine.parallel.ranks import Ranks as WorkerRanks
from sgl_diffusion.engine.tiles import Tiles
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.recipes.registry import open_pipeline
from tests.distributed.ranks import Group, Ranks
from tests.engine.parallel.served import compare, compare_frames
from tests.engine.test_tiles import PIXELS, drawn, local
from tests.recipes.test_wan_lora import write

pytestmark = pytest.mark.timeout(600)  # four processes load torch, on a busy machine, too

WISHES = {
    "guided": SamplingParams(
        prompt="a fox", width=80, height=48, num_inference_steps=3, guidance_scale=5.0, seed=1
    ),
    "plain": SamplingParams(
        prompt="waves", width=96, height=80, num_inference_steps=2, guidance_scale=1.0, seed=2
    ),
    "two": SamplingParams(
        prompt="a cat", width=96, height=48, num_inference_steps=3, seed=3, num_outputs=2
    ),
    "clip": SamplingParams(
        prompt="sea", width=48, height=80, num_frames=9, num_inference_steps=2, seed=4
    ),
}

GATED = {  # guidance that is computed in some steps and remembered in the others
    "half": SamplingParams(
        prompt="a fox", width=80, height=48, num_inference_steps=4, seed=1, cfg_gate_step=0.5
    ),
    "late": SamplingParams(
        prompt="a cat",
        width=96,
        height=48,
        num_inference_steps=5,
        seed=2,
        num_outputs=2,
        guidance_start=0.2,
        cfg_gate_step=0.0,
    ),
    "clip": SamplingParams(
        prompt="sea",
        width=48,
        height=80,
        num_frames=9,
        num_inference_steps=3,
        seed=3,
        cfg_gate_step=0.4,
    ),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(Layout(1, 2, 2), marks=pytest.mark.slow), Layout(2, 1, 2)], ids=str
)
def test_latents_are_those_of_one_rank(
    four_ranks: Ranks, tiny_wan_a: Path, tmp_path: Path, layout: Layout
) -> None:
    adapter = write(tmp_path, "a", 1, 4)
    differences = four_ranks.run(compare, str(tiny_wan_a), layout, str(adapter), WISHES)
    assert 0 < max(differences) < 1e-4


@pytest.mark.parametrize("layout", [Layout(2, 1, 2), Layout(1, 1, 4)], ids=str)
def test_gated_guidance_is_that_of_one_rank(
    four_ranks: Ranks, tiny_wan_a: Path, tmp_path: Path, layout: Layout
) -> None:
    adapter = write(tmp_path, "a", 1, 4)
    differences = four_ranks.run(compare, str(tiny_wan_a), layout, str(adapter), GATED)
    assert 0 < max(differences) < 1e-4


def test_tiles_are_shared_out(four_ranks: Ranks, tiny_wan_a: Path) -> None:
    """Each rank decodes some of them: pictures, a clip, and what is shown of one under way."""
    options = EngineOptions(
        model_path=str(tiny_wan_a), device="cpu", overlap=False, vae_tile_size=32
    )
    wishes = {
        "tiles": SamplingParams(
            prompt="a fox", width=96, height=64, num_inference_steps=3, partial_images=1, seed=1
        ),
        "two": SamplingParams(
            prompt="a cat", width=80, height=48, num_inference_steps=2, num_outputs=2, seed=2
        ),
        "clip": SamplingParams(
            prompt="sea", width=48, height=80, num_frames=9, num_inference_steps=2, seed=3
        ),
    }
    found = four_ranks.run(compare_frames, options, Layout(1, 2, 2), wishes)
    assert max(found) <= 1


def _shared(everyone: Group, size: tuple[int, int]) -> tuple[int, bool]:
    """How many tiles this rank decoded, and whether the frames are those of one rank."""
    latents, calls = drawn(*size), []

    def watched(part: torch.Tensor) -> Iterator[torch.Tensor]:
        calls.append(part)
        return local(part)

    height = size[0] * PIXELS
    together = list(Tiles(watched, 8 * PIXELS, everyone).decode(latents, height))
    alone = list(Tiles(local, 8 * PIXELS).decode(latents, height))
    equal = all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    return len(calls), equal


@pytest.mark.parametrize(("size", "each"), [((20, 20), [3, 2, 2, 2]), ((8, 14), [1, 1, 1, 1])])
def test_each_rank_decodes_its_share(
    four_ranks: Ranks, size: tuple[int, int], each: list[int]
) -> None:
    found = four_ranks.run(_shared, size)
    assert [count for count, _ in found] == each
    assert all(equal for _, equal in found)


def _refused(everyone: Group, path: str) -> SglError | None:
    options = EngineOptions(model_path=path, num_gpus=4, device="cpu", backend="diffusers")
    ranks = WorkerRanks(everyone, options)
    worker = DiffusionWorker(
        lambda note: ranks.together(lambda: open_pipeline(options, note)),
        options,
        SilentOutbox(),
        ranks=ranks,
    )
    try:
        Leader(lambda: (everyone, worker)).load()
    except ConfigError as error:
        return error
    return None


def test_the_fallback_runs_on_one_device(four_ranks: Ranks, tiny_wan_a: Path) -> None:
    for error in four_ranks.run(_refused, str(tiny_wan_a)):
        assert error is not None and "one device only" in error.message


def _one_fails(everyone: Group) -> SglError | None:
    options = EngineOptions(num_gpus=4, device="cpu")

    def opened(note: Any) -> Any:
        raise ConfigError("The third rank cannot.")

    ranks = WorkerRanks(everyone, options)
    try:
        ranks.together(lambda: opened(None) if everyone.index == 2 else None)
    except SglError as error:
        return error
    return None


def test_what_fails_on_one_rank_fails_on_all(four_ranks: Ranks) -> None:
    errors = four_ranks.run(_one_fails)
    assert [str(error) for error in errors] == ["The third rank cannot."] * 4
