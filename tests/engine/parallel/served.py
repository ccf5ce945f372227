"""Jobs through a worker of many ranks and through one of one rank, and how far apart they end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.distributed.layout import Layout
from sgl_diffusion.engine.parallel.follower import SilentOutbox, follow
from sgl_diffusion.engine.parallel.leader import Leader
from sgl_diffusion.engine.parallel.ranks import Ranks
from sgl_diffusion.engine.parallel.turn import Turn, encode_turn
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.orchestrator.stage import CannotGoOnError, Worker
from sgl_diffusion.recipes.registry import open_pipeline
from tests.distributed.ranks import Group
from tests.engine.outbox import RecordingOutbox

Latents = list[torch.Tensor]
Side = tuple[RecordingOutbox, dict[str, Latents]]
Wishes = Mapping[str, SamplingParams]  # of sizes that differ: latents are told apart by their shape


def make_worker(
    options: EngineOptions, outbox: Any, ranks: Ranks | None
) -> tuple[DiffusionWorker, dict[str, Latents]]:
    """A worker, and the latents that it decodes by their shape."""
    seen: dict[str, Latents] = {}

    def opened(note: Any) -> Any:
        pipeline = open_pipeline(options, note)
        decode = pipeline.decode

        def look(latents: torch.Tensor) -> Any:
            if type(latents) is torch.Tensor:  # and not what is only counted
                seen.setdefault(str(tuple(latents.shape)), []).append(latents.clone())
            return decode(latents)

        pipeline.decode = look
        return pipeline

    return DiffusionWorker(opened, options, outbox, ranks=ranks), seen


def _run(worker: Worker, outbox: RecordingOutbox, card: ModelCard, wishes: Wishes) -> None:
    """All at once, and a second one of each that is cancelled in the middle."""
    for name, wish in wishes.items():
        params = card.resolve(wish, video=wish.num_frames is not None and wish.num_frames > 1)
        worker.submit(name, {"params": dataclasses.asdict(params)})
        worker.submit(f"{name} not wanted", {"params": dataclasses.asdict(params)})
        worker.step()
        worker.cancel(f"{name} not wanted")
    while worker.step():
        pass
    assert not outbox.errors, outbox.errors
    assert set(outbox.outputs) >= set(wishes)


def compare(everyone: Group, path: str, layout: Layout, adapter: str, wishes: Wishes) -> float:
    """The largest difference of any latents to those of one rank, relative to the largest; run on
    every rank, and told by the first. An adapter is merged all the while."""
    # One thing after the other: what ends when is the same on both sides.
    alone = EngineOptions(
        model_path=path, backend="native", device="cpu", lora_path=(adapter,), overlap=False
    )
    sides = _both(everyone, alone, layout, wishes)
    if sides is None:
        return 0.0
    (_, seen), (_, expected) = sides
    assert seen.keys() == expected.keys() and len(seen) == len(wishes)
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max())
        for shape, all_theirs in expected.items()
        for ours, theirs in zip(seen[shape], all_theirs, strict=True)
    )


def compare_frames(everyone: Group, options: EngineOptions, layout: Layout, wishes: Wishes) -> int:
    """The largest difference of any frame to that of one rank, of 255."""
    sides = _both(everyone, options, layout, wishes)
    if sides is None:
        return 0
    (ours, _), (theirs, _) = sides
    pairs = [
        (clip, expected)
        for name in wishes
        for clip, expected in zip(ours.outputs[name], theirs.outputs[name], strict=True)
    ]
    for name, parts in theirs.parts.items():
        found = [frames for _, frames in ours.parts[name]]
        assert len(found) == len(parts)
        pairs += [(one[0], other[0]) for one, (_, other) in zip(found, parts, strict=True)]
    return max(int((a.int() - b.int()).abs().max()) for a, b in pairs)


def _both(
    everyone: Group, alone: EngineOptions, layout: Layout, wishes: Wishes
) -> tuple[Side, Side] | None:
    """All ranks, and then the first one alone; only the first rank knows."""
    options = dataclasses.replace(
        alone,
        num_gpus=layout.ranks,
        ulysses_degree=layout.ulysses,
        ring_degree=layout.ring,
        cfg_parallel_size=layout.cfg,
    )
    ranks = Ranks(everyone, options)
    if everyone.index > 0:
        with contextlib.suppress(CannotGoOnError):
            follow(everyone, make_worker(options, SilentOutbox(), ranks)[0])
        return None
    outbox = RecordingOutbox()
    worker, seen = make_worker(options, outbox, ranks)
    leader = Leader(lambda: (everyone, worker))
    leader.load()
    seen.clear()  # of the warm-up and of trials
    card = worker.steps._pipeline.card
    _run(leader, outbox, card, wishes)
    everyone.broadcast(encode_turn(Turn(jobs=["one that nobody has"])))

    reference_outbox = RecordingOutbox()
    reference, expected = make_worker(alone, reference_outbox, None)
    reference.load()
    expected.clear()
    _run(reference, reference_outbox, card, wishes)
    return (outbox, seen), (reference_outbox, expected)
