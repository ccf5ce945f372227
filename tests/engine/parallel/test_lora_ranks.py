"""A change of adapters is made on every rank of a worker or on none."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import NotFoundError, RequestError
from sgl_diffusion.engine.parallel.follower import SilentOutbox, follow
from sgl_diffusion.engine.parallel.leader import Leader
from sgl_diffusion.engine.parallel.ranks import Ranks as WorkerRanks
from sgl_diffusion.engine.parallel.turn import Turn, encode_turn
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.orchestrator.stage import CannotGoOnError
from sgl_diffusion.recipes.registry import open_pipeline
from tests.distributed.ranks import Group, Ranks
from tests.recipes.test_wan_lora import write

Seen = list[tuple[str, str]]  # each action, and a digest of this rank's weights after it


def _digest(worker: DiffusionWorker) -> str:
    whole = hashlib.sha256()
    for part in worker.steps._pipeline.adaptables().values():  # type: ignore[attr-defined]
        for tensor in part.module.state_dict().values():
            whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _changes(everyone: Group, model: str, adapter: str) -> Seen:
    options = EngineOptions(
        model_path=model, device="cpu", num_gpus=4, ulysses_degree=2, ring_degree=2
    )
    worker = DiffusionWorker(
        lambda note: open_pipeline(options, note),
        options,
        SilentOutbox(),
        ranks=WorkerRanks(everyone, options),
    )
    control, seen = worker.control, Seen()

    def watched(action: str, payload: dict[str, Any]) -> Any:
        try:
            if action == "lora_merge" and everyone.index == 2:
                raise RequestError("This rank cannot.")
            return control(action, payload)
        finally:
            seen.append((action, _digest(worker)))

    worker.control = watched  # type: ignore[method-assign]
    if everyone.index > 0:
        with contextlib.suppress(CannotGoOnError):
            follow(everyone, worker)
        return seen
    leader = Leader(lambda: (everyone, worker))
    leader.load()
    seen.append(("loaded", _digest(worker)))
    a = {"nickname": "a", "path": adapter}
    while not leader.control("lora_prepare", {"settings": [a]})["ready"]:
        pass
    leader.control("lora_set", {"settings": [a], "merge_mode": "merge"})
    leader.control("lora_unmerge", {"target": "all"})
    unknown = {"settings": [{"nickname": "b"}], "merge_mode": "merge"}
    with contextlib.suppress(NotFoundError):
        leader.control("lora_set", unknown)
        raise AssertionError("nobody knows b")
    with contextlib.suppress(CannotGoOnError):
        leader.control("lora_merge", {"target": "all", "strength": 1.0})
        raise AssertionError("one rank failed, the others did not")
    everyone.broadcast(encode_turn(Turn(jobs=["one that nobody has"])))
    return seen


def test_on_every_rank_or_on_none(four_ranks: Ranks, tiny_wan_a: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path, "a", 1, 4)
    first, *others = four_ranks.run(_changes, str(tiny_wan_a), str(adapter))
    (_, loaded), *first = first
    acts = ["lora_set", "lora_unmerge", "lora_set"]
    for rank in (first, *others):
        changes = [(act, weights) for act, weights in rank if act != "lora_prepare"]
        assert [act for act, _ in changes] == [*acts, "lora_merge"]
        merged, *without = [weights for _, weights in changes[:3]]
        assert merged == dict(first)["lora_merge"] != loaded
        assert without == [loaded, loaded]
