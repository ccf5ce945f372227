"""The diffusion stage on several ranks: what its first process does, and what the others do.

The ranks meet in a file of a folder of their own, and talk over loopback.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_diffusion.apps.devices import pick_rank_device
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.distributed.layout import ranks_each
from sgl_diffusion.orchestrator.messages import Boot, Payload

if TYPE_CHECKING:
    from sgl_diffusion.distributed.group import Group
    from sgl_diffusion.engine.parallel.leader import Leader
    from sgl_diffusion.engine.worker import DiffusionWorker
    from sgl_diffusion.orchestrator.stage import Outbox

RENDEZVOUS = "rendezvous"


def make_leader(config: Payload, outbox: Outbox) -> Leader:
    """The worker of the stage. The other ranks start first: libraries are loaded side by side."""

    from sgl_diffusion.engine.parallel.processes import start_ranks

    options = EngineOptions(**config["options"])
    ranks = ranks_each(options)
    outbox.loading(f"starting {ranks} ranks")
    folder = tempfile.TemporaryDirectory(prefix="sgld-ranks-")
    place = Path(folder.name)
    start_ranks([_boot(config, options, place, rank) for rank in range(1, ranks)])

    from sgl_diffusion.engine.parallel.leader import Leader

    def meet() -> tuple[Group, DiffusionWorker]:
        assert folder.name, "the folder lives as long as the ranks may meet"
        return _join(config, options, place, 0, outbox)

    return Leader(meet)


def run_follower(config: Payload) -> None:
    """All that a process of another rank does."""
    from sgl_diffusion.engine.parallel.follower import SilentOutbox, follow

    options = EngineOptions(**config["options"])
    follow(*_join(config, options, Path(config["folder"]), config["rank"], SilentOutbox()))


def _boot(config: Payload, options: EngineOptions, folder: Path, rank: int) -> Boot:
    """What another rank gets. Of the adapters in use it has a copy: the first rank writes."""
    state = config["lora_state"]
    if state is not None:
        copy = folder / f"adapters-{rank}.json"
        if Path(state).is_file():
            shutil.copyfile(state, copy)
        state = str(copy)
    own = {**config, "lora_state": state, "rank": rank, "folder": str(folder)}
    return Boot("diffusion", "sgl_diffusion.apps.ranks:run_follower", own, options.log_level)


def _join(
    config: Payload, options: EngineOptions, folder: Path, rank: int, outbox: Outbox
) -> tuple[Group, DiffusionWorker]:
    from sgl_diffusion.apps.diffusion import diffusion_worker
    from sgl_diffusion.distributed.mesh import join_world
    from sgl_diffusion.engine.parallel.ranks import Ranks
    from sgl_diffusion.recipes.registry import find_model

    device = pick_rank_device(options, config.get("replica", 0), rank)
    everyone = join_world(folder / RENDEZVOUS, rank, ranks_each(options), device)
    options = dataclasses.replace(options, device=str(device))
    if rank == 0:
        find_model(options, outbox.loading)
    everyone.broadcast(b"-" if rank == 0 else None)  # the others find it fetched or built
    ranks = Ranks(everyone, options)
    return everyone, diffusion_worker(options, outbox, config["lora_state"], ranks)
