"""The diffusion app: one fused stage that encodes, denoises and decodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.distributed.layout import ranks_each
from sgl_diffusion.distributed.nodes import Nodes
from sgl_diffusion.engine.exclusions import check_options
from sgl_diffusion.orchestrator.messages import Payload
from sgl_diffusion.orchestrator.topology import App, StageSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from sgl_diffusion.engine.parallel.ranks import Ranks
    from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline
    from sgl_diffusion.engine.worker import DiffusionWorker
    from sgl_diffusion.orchestrator.stage import Outbox, Worker


def diffusion_app(options: EngineOptions, *, lora_state: Path | None = None) -> App:
    """The stages of a served diffusion model. Imports no torch: the stage process does.

    `lora_state` is a file by which a worker that dies leaves its adapters to the next; replicas
    share it.
    """
    check_options(options)
    nodes = Nodes.of(options)
    names = [field.name for field in dataclasses.fields(EngineOptions)]
    config = {name: getattr(options, name) for name in names}
    state = None if lora_state is None else str(lora_state)
    stage = StageSpec(
        name="diffusion",
        entry=f"sgl_diffusion.apps.{'ranks:make_node' if nodes.own else 'diffusion:make_worker'}",
        config={"options": config, "lora_state": state},
        replicas=options.dp_size,
    )
    return App(name="diffusion", stages=(stage,), processes=options.num_gpus > 1)


def make_worker(config: Payload, outbox: Outbox) -> Worker:
    """Build the worker of the stage, inside the stage process."""
    options = EngineOptions(**config["options"])
    if ranks_each(options) > 1:
        from sgl_diffusion.apps.ranks import make_leader

        return make_leader(config, outbox)
    if options.dp_size > 1:
        from sgl_diffusion.apps.devices import pick_rank_device

        device = pick_rank_device(options, config["replica"], 0)
        options = dataclasses.replace(options, device=str(device))
    return diffusion_worker(options, outbox, config["lora_state"])


def diffusion_worker(
    options: EngineOptions, outbox: Outbox, lora_state: str | None, ranks: Ranks | None = None
) -> DiffusionWorker:
    """The worker of this process: of the whole stage, or of one of its ranks."""
    from sgl_diffusion.engine.worker import DiffusionWorker
    from sgl_diffusion.recipes.registry import open_pipeline

    def open_everywhere(note: Callable[[str], None]) -> Pipeline | WholePipeline:
        if ranks is None:
            return open_pipeline(options, note)
        return ranks.together(lambda: open_pipeline(options, note))

    return DiffusionWorker(
        open_everywhere,
        options,
        outbox,
        lora_state=None if lora_state is None else Path(lora_state),
        ranks=ranks,
    )
