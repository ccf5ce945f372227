"""The diffusion stage on several ranks: what its first process does, and what the others do.

The ranks of one machine meet in a file of a folder of their own, and talk over loopback. Those of
several meet at an address of machine 0. On the other machines a first process starts the others,
too, and is watched like a worker.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_diffusion.apps.devices import pick_rank_device
from sgl_diffusion.base import env
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.distributed.nodes import Nodes, interface_to
from sgl_diffusion.orchestrator.messages import Boot, Payload

if TYPE_CHECKING:
    from sgl_diffusion.distributed.group import Group
    from sgl_diffusion.engine.parallel.leader import Leader
    from sgl_diffusion.engine.worker import DiffusionWorker
    from sgl_diffusion.orchestrator.stage import Outbox, Worker

RENDEZVOUS = "rendezvous"


def make_leader(config: Payload, outbox: Outbox) -> Leader:
    """The worker of the stage. The other ranks start first: libraries are loaded side by side."""

    from sgl_diffusion.engine.parallel.processes import start_ranks

    options = EngineOptions(**config["options"])
    nodes = Nodes.of(options)
    outbox.loading(f"starting {nodes.ranks} ranks")
    folder = tempfile.TemporaryDirectory(prefix="sgld-ranks-")
    place = Path(folder.name)
    start_ranks([_boot(config, options, place, rank) for rank in range(1, nodes.ranks)])

    from sgl_diffusion.engine.parallel.leader import Leader

    def meet() -> tuple[Group, DiffusionWorker]:
        assert folder.name, "the folder lives as long as the ranks may meet"
        return _join(config, options, place, 0, outbox)

    return Leader(meet, nodes=nodes.count)


def make_node(config: Payload, outbox: Outbox) -> Worker:
    """What runs on another machine than the first, in the place of the worker."""
    from sgl_diffusion.engine.parallel.processes import start_ranks

    options = EngineOptions(**config["options"])
    nodes = Nodes.of(options)
    folder = tempfile.TemporaryDirectory(prefix="sgld-ranks-")
    place, first = Path(folder.name), nodes.own * nodes.ranks
    others = range(first + 1, first + nodes.ranks)
    start_ranks([_boot(config, options, place, rank) for rank in others])

    from sgl_diffusion.engine.parallel.follower import FollowingNode, SilentOutbox

    def meet() -> tuple[Group, DiffusionWorker]:
        assert folder.name, "the folder lives as long as the ranks do"
        outbox.loading(f"waiting for machine 0 at {options.dist_init_addr}")
        return _join(config, options, place, first, SilentOutbox())

    return FollowingNode(meet)


def run_follower(config: Payload) -> None:
    """All that a process of another rank does."""
    from sgl_diffusion.engine.parallel.follower import SilentOutbox, follow

    options = EngineOptions(**config["options"])
    follow(*_join(config, options, Path(config["folder"]), config["rank"], SilentOutbox()))


def _boot(config: Payload, options: EngineOptions, folder: Path, rank: int) -> Boot:
    """What another rank gets."""
    own = {**config, "rank": rank, "folder": str(folder)}
    return Boot("diffusion", "sgl_diffusion.apps.ranks:run_follower", own, options.log_level)


def _join(
    config: Payload, options: EngineOptions, folder: Path, rank: int, outbox: Outbox
) -> tuple[Group, DiffusionWorker]:
    from sgl_diffusion.apps.diffusion import diffusion_worker
    from sgl_diffusion.distributed.mesh import join_world
    from sgl_diffusion.engine.parallel.agreement import agree_on
    from sgl_diffusion.engine.parallel.ranks import Ranks
    from sgl_diffusion.recipes.registry import find_model

    nodes = Nodes.of(options)
    device = pick_rank_device(options, config.get("replica", 0), rank % nodes.ranks)
    if rank % nodes.ranks == 0:
        # Before the ranks meet: the others find it fetched or built, and what builds the tiny
        # model writes nothing in a process that is a later rank of a group.
        find_model(options, outbox.loading)
    if nodes.address is not None:
        env.talk_over(interface_to(nodes.address))
    meeting = nodes.address or folder / RENDEZVOUS
    everyone = join_world(meeting, rank, nodes.count * nodes.ranks, device)
    agree_on(everyone, _shared(options))
    options = dataclasses.replace(options, device=str(device))
    state = _adapters(everyone, config["lora_state"], folder)
    return everyone, diffusion_worker(options, outbox, state, Ranks(everyone, options))


def _adapters(everyone: Group, state: str | None, folder: Path) -> str | None:
    """The file of the adapters in use. The first rank has it, if any; the others have copies."""
    if everyone.index == 0:
        kept = state is not None and Path(state).is_file()
        everyone.broadcast(Path(state).read_bytes() if state is not None and kept else b"")
        return state
    copy = folder / f"adapters-{everyone.index}.json"
    if data := everyone.broadcast(None):
        copy.write_bytes(data)
    return str(copy)


def _shared(options: EngineOptions) -> Payload:
    """What the commands on all machines must agree on."""
    own = ("node_rank", "device", "data_dir", "log_level")
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in own}
