"""A worker of four ranks gives the latents of one rank: jobs, guidance, adapters, cancelling."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, SglError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.distributed.layout import Layout
from sgl_diffusion.engine.parallel.follower import SilentOutbox, follow
from sgl_diffusion.engine.parallel.leader import Leader
from sgl_diffusion.engine.parallel.ranks import Ranks as WorkerRanks
from sgl_diffusion.engine.parallel.turn import Turn, encode_turn
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Worker
from sgl_diffusion.recipes.registry import open_pipeline
from tests.distributed.ranks import Group, Ranks
from tests.engine.outbox import RecordingOutbox
from tests.recipes.test_wan_lora import write

pytestmark = pytest.mark.timeout(600)  # four processes load torch, on a busy machine, too

Latents = list[torch.Tensor]
WISHES = {
    "guided": SamplingParams(
        prompt="a fox", width=80, height=48, num_inference_steps=3, guidance_scale=5.0, seed=1
    ),
    "plain": SamplingParams(
        prompt="waves", width=96, height=80, num_inference_steps=2, guidance_scale=1.0, seed=2
    ),
    "two": SamplingParams(
        prompt="a cat", width=80, height=48, num_inference_steps=3, seed=3, num_outputs=2
    ),
    "clip": SamplingParams(
        prompt="sea", width=48, height=80, num_frames=9, num_inference_steps=2, seed=4
    ),
}


def _worker(
    options: EngineOptions, outbox: Any, ranks: WorkerRanks | None
) -> tuple[DiffusionWorker, dict[str, Latents]]:
    """A worker, and the latents that it decodes by their shape."""
    seen: dict[str, Latents] = {}

    def opened(note: Any) -> Any:
        pipeline = open_pipeline(options, note)
        decode = pipeline.decode

        def look(latents: torch.Tensor) -> Any:
            seen.setdefault(str(tuple(latents.shape)), []).append(latents.clone())
            return decode(latents)

        pipeline.decode = look
        return pipeline

    return DiffusionWorker(opened, options, outbox, ranks=ranks), seen


def _run(worker: Worker, outbox: RecordingOutbox, cards: Any) -> None:
    for name, wish in WISHES.items():
        params = cards.resolve(wish, video=wish.num_frames is not None and wish.num_frames > 1)
        worker.submit(name, {"params": dataclasses.asdict(params)})
        worker.submit(f"{name} not wanted", {"params": dataclasses.asdict(params)})
        worker.step()
        worker.cancel(f"{name} not wanted")
    while worker.step():
        pass
    assert not outbox.errors, outbox.errors
    assert set(outbox.outputs) >= set(WISHES)


def _compare(everyone: Group, path: str, layout: Layout, adapter: str) -> float:
    """The largest difference of any latents to those of one rank, relative to the largest."""
    alone = EngineOptions(model_path=path, backend="native", device="cpu", lora_path=(adapter,))
    options = dataclasses.replace(
        alone,
        num_gpus=layout.ranks,
        ulysses_degree=layout.ulysses,
        ring_degree=layout.ring,
        cfg_parallel_size=layout.cfg,
    )
    ranks = WorkerRanks(everyone, options)
    if everyone.index > 0:
        with contextlib.suppress(CannotGoOnError):
            follow(everyone, _worker(options, SilentOutbox(), ranks)[0])
        return 0.0
    outbox = RecordingOutbox()
    worker, seen = _worker(options, outbox, ranks)
    leader = Leader(lambda: (everyone, worker))
    leader.load()
    card = worker.steps._pipeline.card
    _run(leader, outbox, card)
    everyone.broadcast(encode_turn(Turn(jobs=["one that nobody has"])))

    reference_outbox = RecordingOutbox()
    reference, expected = _worker(alone, reference_outbox, None)
    reference.load()
    _run(reference, reference_outbox, card)
    assert seen.keys() == expected.keys() and len(seen) == 4
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max())
        for shape, all_theirs in expected.items()
        for ours, theirs in zip(seen[shape], all_theirs, strict=True)
    )


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(2, 1, 2)], ids=str)
def test_latents_are_those_of_one_rank(
    four_ranks: Ranks, tiny_wan_a: Path, tmp_path: Path, layout: Layout
) -> None:
    adapter = write(tmp_path, "a", 1, 4)
    differences = four_ranks.run(_compare, str(tiny_wan_a), layout, str(adapter))
    assert 0 < max(differences) < 1e-4


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
